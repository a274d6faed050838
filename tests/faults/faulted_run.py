"""A run under a plan of faults: started, disturbed, started again where it does not go on by itself, and timed."""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import fault_plans
import observations
import psutil
from programs import BIN, Bench, killed

from syncbn.launch.periodic import periodically

FAULTS = Path(__file__).parent
COMMANDS = {
    "local": (sys.executable, "-m", "syncbn", "train"),
    "torchrun": (str(BIN / "torchrun"), "--standalone", "--max-restarts=9", "--nproc-per-node"),
    "ray": (sys.executable, "-m", "syncbn", "train", "launcher=ray"),
}
SETTINGS = (
    "extensions=[observer]",
    "tracking=journal",
    "data=digits",
    "norm=sync",
    "model.hidden=[16]",
    "train.per_rank_batch=4",
    "train.checkpoint_every=10",
)
LOOK_S = 0.02
HANGS_S = 1800.0
LOST = (75, 143, -9)
"""Exit codes of a command that the same command continues."""


@dataclass
class Outcome:
    """What came of a run under faults."""

    folder: Path
    code: int = 0
    seconds: float = 0.0
    happened: list[fault_plans.Fault] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    """Seconds from each fault to the first step of another attempt that had not been taken before."""
    again: int = 0
    """How often the command had to be given again."""
    redone: int = 0
    """Steps of rank 0 that were taken more than once."""
    left: list[str] = field(default_factory=list)
    """Processes that outlived the run."""


def command(launcher: str, num_ranks: int, settings: Sequence[str]) -> list[str]:
    """The command line of a run of `num_ranks` ranks."""
    words = [*COMMANDS[launcher]]
    if launcher == "torchrun":
        return [*words, str(num_ranks), "-m", "syncbn", "train", *SETTINGS, *settings]
    return [*words, f"launcher.num_workers={num_ranks}", *SETTINGS, *settings]


def run_under(
    bench: Bench,
    launcher: str,
    name: str,
    settings: Sequence[str],
    faults: Sequence[fault_plans.Fault] = (),
    num_ranks: int = 2,
    most: int = 4,
) -> Outcome:
    """Run `settings` under `faults`; give the command again, at most `most` times, while it ends for want of a process.

    The run's folder is `runs/name` in the bench's.
    """
    bench.environ["PYTHONPATH"] = ":".join([str(FAULTS), *sys.path])
    outcome = Outcome(bench.folder / "runs" / name)
    words = command(launcher, num_ranks, [*settings, f"name={name}"])
    began = time.monotonic()
    with _Injector(outcome, faults) as injector:
        while True:
            outcome.code = _once(bench, words, injector)
            lost = outcome.code in LOST or (launcher == "torchrun" and outcome.code != 0)
            if not lost or outcome.again == most:
                break
            outcome.again += 1
    outcome.seconds = time.monotonic() - began
    outcome.left = bench.left_running()
    steps = [line.step for line in observations.lines_of(outcome.folder, 0)]
    outcome.redone = len(steps) - len(set(steps))
    return outcome


def _once(bench: Bench, words: Sequence[str], injector: "_Injector") -> int:
    """The exit code of the command `words`."""
    with (bench.folder / "output.log").open("a") as log:
        process = bench.start(*words, stdout=log, stderr=subprocess.STDOUT)
    injector.launcher = process.pid
    with killed(process):
        return process.wait(HANGS_S)


class _Injector:
    """Within, each of `faults` happens to `launcher` or its ranks when its step comes, and what follows is timed."""

    def __init__(self, outcome: Outcome, faults: Sequence[fault_plans.Fault]) -> None:
        self._outcome, self._waiting = outcome, list(faults)
        self._broken: tuple[float, int, int] | None = None
        self.launcher = 0

    def __enter__(self) -> "_Injector":
        self._stack = ExitStack()
        self._stack.enter_context(periodically(self._look, LOOK_S))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _look(self) -> None:
        folder = self._outcome.folder
        furthest = max((line.step for line in observations.lines_of(folder, 0)), default=0)
        attempts = observations.num_attempts(folder)
        if self._broken is not None and furthest > self._broken[1] and attempts > self._broken[2]:
            self._outcome.recoveries.append(time.monotonic() - self._broken[0])
            self._broken = None
        if self._broken is None and self._waiting and furthest >= self._waiting[0].step:
            self._happen(self._waiting.pop(0), furthest, attempts)

    def _happen(self, fault: fault_plans.Fault, furthest: int, attempts: int) -> None:
        pid = observations.pid_of(self._outcome.folder, fault.rank)
        assert pid is not None, "a rank that has taken steps has said which process it is"
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            fault_plans.KINDS[fault.kind](fault_plans.Target(pid, self.launcher))
            self._outcome.happened.append(fault)
            self._broken = time.monotonic(), furthest, attempts
