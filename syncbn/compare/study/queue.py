"""The trials of a wave, run one after the other by one group of processes that is started once.

Trials that need all ranks run first, in the same order on every rank. Trials of one process follow: a process that is
free takes the next trial whose folder is not locked, so long and short ones balance, and processes need not
communicate.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

from syncbn.checkpoint import FolderInUse, RunLock
from syncbn.compare.measure import DEFAULT, deciding, measure
from syncbn.compare.study.design import Trial
from syncbn.compare.study.failure import note_failure, of_the_trial
from syncbn.config import RunConfig, config_hash
from syncbn.data import kept_in_memory
from syncbn.errors import NonFinite, Stopped
from syncbn.runtime.base import Runtime
from syncbn.train.agreement import agreed_signal
from syncbn.train.record import finished, recorded_run, write_summary
from syncbn.train.stopping import stop_on_signals
from syncbn.train.summary import RunSummary


def run_trials(
    trials: Sequence[Trial], cfg: RunConfig, runtime: Runtime, *, go_on: bool = False
) -> None:
    """Run those of `trials` that have not finished; every rank calls it.

    A trial whose loss stops being finite counts as finished, with `diverged` 1, an infinite training loss and,
    where its task is classification, a test error of 1.

    Args:
        trials: in the order in which they run.
        cfg: what every rank is given.
        runtime: this rank's.
        go_on: a trial of one process that fails is noted in its folder, and the next is taken. One on several ranks
            leaves these in different places, so that its failure ends the group.

    Raises:
        Stopped: by a signal, in a trial (its checkpoint is saved) or between two.
        SyncbnError: a trial failed otherwise; finished ones are kept.
    """
    del cfg  # what every rank is given; each trial has its own
    pending = [trial for trial in trials if finished(trial.config) is None]
    together = [trial for trial in pending if trial.config.num_ranks == runtime.world_size]
    alone = [trial for trial in pending if trial.config.num_ranks != runtime.world_size]
    runtime.barrier()  # every rank has looked before any trial finishes
    with stop_on_signals() as stop, kept_in_memory():
        for trial in together:
            _stop_if(agreed_signal(stop.signal_number, runtime))
            _run(trial, runtime)
        for trial in alone:
            _stop_if(stop.signal_number)
            noted = _noted(trial) if go_on else nullcontext()
            with suppress(FolderInUse), RunLock(trial.config.folder), noted:
                _run(trial, runtime.solo())  # unless another process has it


@contextmanager
def _noted(trial: Trial) -> Iterator[None]:
    """Keep a failure that is the trial's own in its folder, and go on."""
    try:
        yield
    except Exception as error:
        if not of_the_trial(error):
            raise
        note_failure(trial.config.folder, error)


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
    """A network whose outputs are not numbers classifies nothing; any other task has no number for it."""
    final = {"train_loss": math.inf, "diverged": 1.0}
    if deciding(cfg.task) == measure(DEFAULT):
        final["test_error"] = 1.0
    return RunSummary(final, steps, 0.0, world_size, config_hash(cfg))
