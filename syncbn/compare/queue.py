"""The trials of a study, arms x seeds, streamed through one group of ranks that is started once.

Trials that need all ranks run first, in the same order on every rank. Trials of one process (`big_batch`) follow,
dealt out over the ranks, which need nothing of each other then.
"""

import math
from dataclasses import dataclass, replace

from syncbn.compose import vary
from syncbn.config import Config, RunConfig, config_hash
from syncbn.errors import NonFinite, Stopped, UsageError
from syncbn.runtime.base import Runtime
from syncbn.train.agreement import agreed_signal
from syncbn.train.record import finished, recorded_run, write_summary
from syncbn.train.stopping import stop_on_signals
from syncbn.train.summary import RunSummary


@dataclass(frozen=True)
class Trial:
    """One arm under one seed."""

    arm: str
    seed: int
    config: RunConfig
    """The run; its folder is `<study folder>/trials/<arm>-<seed>`."""

    @property
    def name(self) -> str:
        """The trial's folder name."""
        return f"{self.arm}-{self.seed}"


def trials(cfg: Config) -> list[Trial]:
    """All trials of the study in `cfg`, seed by seed, so that an interrupted study has whole pairs.

    Raises:
        UsageError: `cfg` has no study, or an arm's overrides cannot be used.
    """
    if cfg.study is None:
        raise UsageError("study is not set: name one with study=NAME")
    arms = {arm: vary(cfg, overrides) for arm, overrides in cfg.study.arms.items()}
    folder = str(cfg.folder / "trials")
    return [
        Trial(arm, seed, replace(run, name=f"{arm}-{seed}", seed=seed, runs_dir=folder))
        for seed in cfg.study.seeds
        for arm, run in arms.items()
    ]


def run_trials(cfg: Config, runtime: Runtime) -> None:
    """Run the trials of the study that have not finished; every rank calls it.

    A trial whose loss stops being finite counts as finished, with `diverged` 1, a test error of 1 and an infinite
    training loss.

    Raises:
        Stopped: by a signal, in a trial (its checkpoint is saved) or between two.
        SyncbnError: a trial failed otherwise; finished ones are kept.
    """
    again = not cfg.train.resume
    pending = [trial for trial in trials(cfg) if again or finished(trial.config) is None]
    together = [trial for trial in pending if trial.config.num_ranks == runtime.world_size]
    alone = [trial for trial in pending if trial.config.num_ranks != runtime.world_size]
    runtime.barrier()  # every rank has looked before any trial finishes
    with stop_on_signals() as stop:
        for trial in together:
            _stop_if(agreed_signal(stop.signal_number, runtime))
            _run(trial, runtime)
        for trial in alone[runtime.rank :: runtime.world_size]:
            _stop_if(stop.signal_number)
            _run(trial, runtime.solo())


def _stop_if(signal_number: int) -> None:
    if signal_number:
        raise Stopped(signal_number)


def _run(trial: Trial, runtime: Runtime) -> None:
    try:
        recorded_run(trial.config, runtime)
    except NonFinite as error:
        if runtime.is_main:
            outcome = _diverged(trial.config, error.steps, runtime.world_size)
            write_summary(trial.config.folder, outcome)


def _diverged(cfg: RunConfig, steps: int, world_size: int) -> RunSummary:
    """A network whose outputs are not numbers classifies nothing."""
    final = {"train_loss": math.inf, "test_error": 1.0, "diverged": 1.0}
    return RunSummary(final, steps, 0.0, world_size, config_hash(cfg))
