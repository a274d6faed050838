"""Several studies, one after the other, unattended; a failure of one leaves the others alone.

Each study is a process of its own. That costs some seconds a study. In return one that crashes, is killed for its
memory, or leaves threads and files behind cannot end the others. The process is given a session of its own, so that
Ctrl-C reaches it once, from here, and not twice; should this process be killed, the kernel asks it to stop.
"""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from syncbn.compare.suite.tiers import Launch
from syncbn.launch.plan import Plan
from syncbn.signals import STOPPING, as_stop, heeded

COMPARE = (sys.executable, "-m", "syncbn", "compare")
MEANINGS = {
    0: "done",
    1: "our bug",
    2: "usage or config",
    3: "data",
    4: "checkpoint",
    5: "ranks disagree",
    6: "a service is unreachable",
    7: "not authorised",
    8: "non-finite loss or statistics",
    75: "infrastructure died: try again",
    130: "stopped",
    143: "stopped",
}
"""What a study's exit code says."""

WORST_FIRST = (1, 5, 8, 4, 2, 3, 7, 6, 75)
"""A bug hides whatever else there is; what may go away by itself comes last."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """One study to run."""

    launch: Launch
    overrides: tuple[str, ...]
    plan: Plan | None
    """None where its settings cannot be used."""
    refused: str = ""
    """Why they cannot."""

    @property
    def folder(self) -> Path:
        """Where its files go."""
        assert self.plan is not None
        return self.plan.config.folder


@dataclass(frozen=True)
class Outcome:
    """How one study ended."""

    job: Job
    code: int
    seconds: float
    """Of this launch."""
    trained: bool
    """Whether it finished a trial that was not finished before."""
    note: str
    """What it said of its failure."""

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it."""
        return self.code in (130, 143)


def run_all(
    jobs: Sequence[Job],
    begin: Callable[[Job], None],
    done: Callable[[Outcome], None],
    stdout: IO[Any] | None = None,
) -> int:
    """Run `jobs` in order and return the signal that stopped them, or 0.

    Args:
        jobs: what to run; one that is refused counts as ended with exit code 2.
        begin: called before each starts.
        done: called with how each ended, before the next starts.
        stdout: where the studies' output goes instead of this process's.
    """
    with _handing_on() as running:
        for job in jobs:
            begin(job)
            outcome = _refused(job) if job.plan is None else _run(job, running, stdout)
            done(outcome)
            if running.signal_number or outcome.stopped:
                return running.signal_number or outcome.code - 128
    return 0


def worst(codes: Sequence[int]) -> int:
    """The exit code of the worst failure, 0 where there is none."""
    failures = [code for code in codes if code]
    return min(failures, key=WORST_FIRST.index, default=0)


def failure_words(codes: Mapping[str, int]) -> str:
    """Which studies failed, and how, in one line."""
    failed = [f"{name} ({MEANINGS[code]})" for name, code in codes.items() if code]
    return f"{len(failed)} of {len(codes)} studies failed: {', '.join(failed)}"


def _refused(job: Job) -> Outcome:
    return Outcome(job, 2, 0.0, trained=False, note=job.refused)


class _Running:
    """The process that runs now, and the signal that asked all of them to stop."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[Any] | None = None
        self.signal_number = 0

    def hand_on(self, signal_number: int, _frame: FrameType | None) -> None:
        """Remember the signal, and give it to the process that runs."""
        self.signal_number = as_stop(signal_number)
        if self.process is not None:
            self.process.send_signal(signal_number)

    def wait_for(self, command: Sequence[str], stdout: IO[Any] | None) -> int:
        """Run `command` to its end and return its exit code, as `Popen` has it."""
        self.process = subprocess.Popen(
            command, stdout=stdout, start_new_session=True, preexec_fn=_stop_with_parent
        )
        if self.signal_number:  # it came while the process was being made
            self.process.send_signal(self.signal_number)
        code = self.process.wait()
        self.process = None
        return code


@contextmanager
def _handing_on() -> Iterator[_Running]:
    """Hand the signals of `STOPPING` on to the process that runs, while the context lasts."""
    running = _Running()
    before = {n: signal.signal(n, running.hand_on) for n in heeded()}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(job: Job, running: _Running, stdout: IO[Any] | None) -> Outcome:
    since, clock = time.time(), time.monotonic()
    code = _exit_code(running.wait_for([*COMPARE, *job.overrides], stdout))
    seconds = time.monotonic() - clock
    return Outcome(job, code, seconds, _trained(job.folder, since), _note(job.folder, code, since))


def _stop_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it has exited, for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit_code(code: int) -> int:
    """The code of a process; one that was killed from outside is infrastructure, one that crashed is a bug."""
    if code >= 0:
        return code if code in MEANINGS else 1
    if -code in STOPPING:
        return 128 + as_stop(-code)
    return 75 if code == -signal.SIGKILL else 1


def _trained(folder: Path, since: float) -> bool:
    """Whether a trial in `folder`, of the study or of its search, ended after `since`."""
    return any(path.stat().st_mtime >= since for path in folder.glob("*/*/summary.json"))


def _note(folder: Path, code: int, since: float) -> str:
    """The last line of what the study wrote of its failure, if it wrote any."""
    log = folder / "error.log"
    if code == 0 or not log.is_file() or log.stat().st_mtime < since:
        return ""
    lines = log.read_text().strip().splitlines()
    return lines[-1].strip() if lines else ""
