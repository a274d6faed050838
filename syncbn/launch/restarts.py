"""Attempts that ended because a process, a node or a link died are made again, from the newest checkpoint.

A launcher has one `Restarts` a launch, and lets `healed` make its attempts. At most `launcher.max_restarts` restarts
begin within any hour, each after a pause that grows while attempts save nothing; then the failure is raised as it is.
Nothing else is tried again: neither what a person must mend (exit codes 1 to 8), nor a stop by a signal or by
`train.time_limit_s`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from syncbn.checkpoint import FolderInUse, RunLock
from syncbn.compare.study.design import Trial
from syncbn.compare.study.failure import failure_in
from syncbn.config import RunConfig
from syncbn.errors import (
    START_AGAIN,
    InfrastructureError,
    OutOfTime,
    Stopped,
    class_of,
    exit_code,
    of_rank,
    with_class,
)
from syncbn.kept_checkpoint import LATEST
from syncbn.launch.outcomes import was_stopped
from syncbn.tracking.attempts import close_attempt, has_saved_since, note_restart
from syncbn.tracking.redact import redact_text
from syncbn.train.record import finished
from syncbn.train.stopping import stop_on_signals

WINDOW_S = 3600.0
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LEFT_S = 30.0
"""How long ranks of an attempt that is over may take to leave the run's folder."""

Runs = Sequence[RunConfig]
Attempt = Callable[[Runs], Any]
"""Trains those of the runs that have not finished."""


class Restarts:
    """The restarts of one launch: at most `most` within any hour.

    Args:
        most: `launcher.max_restarts`.
        clock: seconds that never go back.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        self._begun: list[float] = []
        self.since = time.time()
        """When the launch began, in seconds since the epoch."""

    def next(self) -> int | None:
        """Begin one: its number within the hour, from 1; None where there is none left."""
        now = self._clock()
        self._begun = [begun for begun in self._begun if now - begun < WINDOW_S]
        if len(self._begun) >= self.most:
            return None
        self._begun.append(now)
        return len(self._begun)


def heals(error: BaseException) -> bool:
    """Whether another attempt may succeed where `error` ended one, without a person."""
    over = class_of(error) == OutOfTime.__name__
    return exit_code(error) == InfrastructureError.exit_code and not over


def healed(attempt: Attempt, runs: Runs, restarts: Restarts) -> Any:
    """What `attempt` returns of `runs`, made again where it ended with what `heals`.

    The journals of `runs` say how each attempt ended, also where it could not say so itself.

    Raises:
        SyncbnError: of the last attempt.
        Stopped: a signal came between two attempts.
    """
    before: Mapping[Path, int] | None = None
    fruitless = 0
    while True:
        try:
            return attempt(runs)
        except BaseException as error:
            _close(runs, restarts, error)
            number = restarts.next() if heals(error) else None
            if number is None:
                raise
            reason = _reason(error)
        runs = [resumed(run, restarts.since) for run in runs]
        steps = {run.folder: step_of(run) for run in runs if _is_left(run)}
        _say(f"{reason}: restart {number} of {restarts.most}, {_going_on(steps, len(runs))}")
        for run in runs:
            if run.folder in steps:
                _note(run, restarts, reason, steps[run.folder])
        fruitless = fruitless + 1 if steps == before else 0
        before = steps
        _pause(min(LONGEST_PAUSE_S, PAUSE_S * 2**fruitless), saved=any(steps.values()))


def healed_waves(
    cfg: RunConfig, run: Callable[[Sequence[Trial], int], Any]
) -> Callable[[Sequence[Trial], int], Any]:
    """`run`, of the trials of a wave and a number of processes, made again for those that are left where it `heals`.

    All waves share the restarts of one launch. A trial whose failure a sweep has noted is not tried again.
    """
    restarts = Restarts(cfg.launcher.max_restarts)

    def run_healed(wave: Sequence[Trial], processes: int) -> Any:
        def attempt(configs: Runs) -> Any:
            trials = [replace(t, config=config) for t, config in zip(wave, configs, strict=True)]
            left = [trial for trial in trials if failure_in(trial.config.folder) is None]
            return run(left, processes)

        return healed(attempt, [trial.config for trial in wave], restarts)

    return run_healed


def resumed(cfg: RunConfig, since: float) -> RunConfig:
    """`cfg`, which goes on from what the run has saved since `since`, also with `train.resume=false`."""
    goes_on = cfg.train.resume or has_saved_since(cfg.folder / "journal.jsonl", since)
    return replace(cfg, train=replace(cfg.train, resume=goes_on))


def step_of(cfg: RunConfig) -> int:
    """The step that the next attempt at `cfg` goes on from, by the name of its newest checkpoint."""
    with suppress(OSError, ValueError):
        name = (cfg.folder / "checkpoints" / LATEST).read_text().strip()
        return int(name.removeprefix("step-")) if cfg.train.resume else 0
    return 0


def _is_left(cfg: RunConfig) -> bool:
    """Whether the next attempt trains `cfg`."""
    done = cfg.train.resume and finished(cfg) is not None
    return not done and failure_in(cfg.folder) is None


def _close(runs: Runs, restarts: Restarts, error: BaseException) -> None:
    """Let every attempt that has not said how it ended end with `error`."""
    if class_of(error) == FolderInUse.__name__:
        return  # it is another job's
    status = "stopped" if was_stopped(error) else "failed"
    reason = redact_text(with_class(error))
    for run in runs:
        path = run.folder / "journal.jsonl"
        if run.folder.is_dir():
            _when_left(run, partial(close_attempt, path, restarts.since, status, reason))


def _note(run: RunConfig, restarts: Restarts, reason: str, step: int) -> None:
    journal = run.folder / "journal.jsonl"
    if journal.is_file():
        note_restart(journal, restarts.since, redact_text(reason), step)


def _when_left(run: RunConfig, write: Callable[[], object]) -> None:
    """`write` once no process of the attempt holds the run's folder; not at all where one does not leave it."""
    limit = time.monotonic() + LEFT_S
    while True:
        try:
            with RunLock(run.folder):
                write()
            return
        except FolderInUse:
            if time.monotonic() > limit:
                return
        time.sleep(0.1)


def _reason(error: BaseException) -> str:
    """What `error` says, without what to do about it."""
    said = str(error).removesuffix(f": {START_AGAIN}").removesuffix(f", {START_AGAIN}")
    rank = of_rank(error)
    return said if rank is None or said.startswith(f"rank {rank} ") else f"rank {rank}: {said}"


def _going_on(steps: Mapping[Path, int], num_runs: int) -> str:
    if num_runs > 1:
        return f"going on with {len(steps)} of {num_runs} trials"
    if not steps:
        return "of which all is trained"
    step = max(steps.values())
    return f"going on from step {step}" if step else "beginning anew"


def _say(line: str) -> None:
    sys.stderr.write(f"syncbn: {redact_text(' '.join(line.split()))}\n")
    sys.stderr.flush()


def _pause(seconds: float, saved: bool) -> None:
    """Wait `seconds`.

    Raises:
        Stopped: a signal came.
    """
    limit = time.monotonic() + seconds
    with stop_on_signals() as stop:
        while not stop.signal_number and time.monotonic() < limit:
            time.sleep(0.05)
    if stop.signal_number:
        raise Stopped(stop.signal_number, saved=saved)
