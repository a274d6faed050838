"""The work around the trials of a study, in the process that starts it, whichever launcher runs them.

Statistics and figures are imported once the trials are done: ranks that are started from here import this module too,
and scipy would cost each of them a second and a half.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from syncbn.checkpoint import RunLock
from syncbn.compare.study.design import Trial, trials, waves
from syncbn.compare.study.tuning import chosen, search, tuned_values
from syncbn.config import Config
from syncbn.launch.outcomes import was_stopped
from syncbn.launch.tracked import probe_tracking
from syncbn.tracking import read_journal
from syncbn.tracking.study import StudyTracker, Swept
from syncbn.train.record import finished

RunWave = Callable[[Sequence[Trial], int], object]
"""Lets so many processes take these trials, and returns when they are done."""
PrintTable = Callable[[dict[str, Any], Console, Path], None]
"""Prints what stands in a summary, and names files in the folder."""


def conduct(cfg: Config, run: RunWave) -> dict[str, Any]:
    """Let `run` take the trials of the study in `cfg`, then write its results, print them, and return the summary.

    Raises:
        SyncbnError: MLflow cannot be used, a trial failed, or the results cannot be compared; finished trials are
            kept.
    """
    with (
        held(cfg, [*trials(cfg), *search(cfg)]) as clock,
        launched(cfg, trials(cfg), clock),
    ):
        _search(cfg, run, clock)
        with trained(trials(cfg), clock):
            _take(trials(cfg, tuned_values(chosen(cfg))), cfg, run)
        from syncbn.compare.results import write_results

        summary = write_results(cfg)
        clock.lap("statistics, figures, report")
    from syncbn.compare.report.terminal import print_table

    show(print_table, summary, cfg, clock)
    return summary


@contextmanager
def held(cfg: Config, wanted: Sequence[Trial]) -> Iterator["Clock"]:
    """The folder of `cfg` held against other jobs, once MLflow is known to work; gives the clock of this process.

    With `train.resume=false` what earlier launches left of the trials `wanted` is forgotten.

    Raises:
        SyncbnError: MLflow cannot be used, or another job holds the folder.
    """
    clock = Clock()
    probe_tracking(cfg)
    with RunLock(cfg.folder):
        if not cfg.train.resume:
            _forget([trial.config.folder for trial in wanted])
        yield clock


@contextmanager
def launched(
    cfg: Config, wanted: Sequence[Trial], clock: "Clock", swept: Swept | None = None
) -> Iterator[None]:
    """A launch of the trials `wanted` as MLflow sees it, ended in its true state; `swept` is a sweep's."""
    tracker = StudyTracker(cfg, swept)
    try:
        tracker.follow([trial.config.folder for trial in wanted])
        yield
    except BaseException as error:
        status = "stopped" if was_stopped(error) else "failed"
        tracker.finish(status, f"{type(error).__name__}: {error}")
        raise
    tracker.finish()
    clock.lap("last records to MLflow")


@contextmanager
def trained(wanted: Sequence[Trial], clock: "Clock") -> Iterator[None]:
    """Book the time within on `clock`: until the first of the trials `wanted` begins, and after it."""
    began = time.time()
    yield
    clock.lap("start", until=_first_start([trial.config.folder for trial in wanted], since=began))
    clock.lap("training")


def show(print_table: PrintTable, summary: dict[str, Any], cfg: Config, clock: "Clock") -> None:
    """Print the summary's table, and how long each part of the launch took."""
    console = Console()
    print_table(summary, console, cfg.folder)
    console.print(f"Time: {clock}")


def _search(cfg: Config, run: RunWave, clock: "Clock") -> None:
    """The trials that choose what each arm runs with, where the study asks for them."""
    trials_of_search = search(cfg)
    if trials_of_search:
        _take(trials_of_search, cfg, run)
        clock.lap("tuning")


def _take(wanted: Sequence[Trial], cfg: Config, run: RunWave) -> None:
    """Let processes take those of `wanted` that have not finished, wave by wave."""
    pending = [trial for trial in wanted if finished(trial.config) is None]
    for processes, wave in waves(pending, cfg.launcher.processes):
        run(wave, processes)


def _forget(folders: Sequence[Path]) -> None:
    """Begin anew: what earlier trials left no longer counts as finished, nor as begun."""
    for folder in folders:
        (folder / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _first_start(folders: Sequence[Path], since: float) -> float | None:
    """When the first trial of this launch began, in seconds since the epoch; None where none had to."""
    journals = [folder / "journal.jsonl" for folder in folders]
    records = (record for path in journals if path.is_file() for record in read_journal(path))
    starts = [r["time"] for r in records if r.get("event") == "start" and r["time"] >= since]
    return min(starts, default=None)


@dataclass
class Clock:
    """How long each part of this process's life took, in seconds."""

    parts: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=lambda: psutil.Process().create_time())

    def lap(self, part: str, until: float | None = None) -> None:
        """Book the time since the last lap under `part`; up to `until` (since the epoch) where it is given."""
        now = time.time() if until is None else until
        self.parts[part] = now - self._since
        self._since = now

    def __str__(self) -> str:
        """All parts and their sum."""
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.parts.items())
        return f"{parts}; {sum(self.parts.values()):.1f} s in all"
