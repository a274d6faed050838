"""Whether another process of this machine lives, works or sleeps, read from Linux's `/proc`.

A process sleeps when it uses next to no processor time, its descendants (data loaders) included, and its main
thread waits neither for a core nor for a disk. The threads that libraries keep wake up now and then: hence a share of a
core, not zero.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.5
"""Time between two looks at the processor time, which is counted in ticks of 10 ms."""
BUSY_SHARE = 0.05
"""Share of one core from which on a process is at work."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same id by when it started.

    Attributes:
        pid: its id.
        started: in ticks since the machine's start; 0 accepts any.
    """

    pid: int
    started: int = 0

    @staticmethod
    def own() -> "Process":
        """This process."""
        return Process(os.getpid(), int(_stat(os.getpid())[19]))

    def state(self) -> str:
        """Linux's letter for the state of its main thread; "X" once it has ended, buried or not."""
        try:
            fields = _stat(self.pid)
        except OSError:
            return "X"
        lives = fields[0] not in "ZX" and self.started in (0, int(fields[19]))
        return fields[0] if lives else "X"


class Rest:
    """For how long a process has been asleep, as far as somebody looked."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._looked = self._asleep_since = time.monotonic()
        self._used_s = _used_s(process.pid)

    def asleep_s(self) -> float:
        """Seconds since the process was last seen at work, stopped or traced; to be called again and again."""
        now = time.monotonic()
        if now - self._looked >= SAMPLE_S:
            used_s = _used_s(self._process.pid)
            at_work = used_s - self._used_s > BUSY_SHARE * (now - self._looked)
            if at_work or self._process.state() not in "SI":
                self._asleep_since = now
            self._looked, self._used_s = now, used_s
        return now - self._asleep_since


def machine() -> bytes:
    """Where this process's id means something: the machine since its start, and the namespace of ids on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        return boot + os.fsencode(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return b""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; the second may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _used_s(pid: int) -> float:
    """Processor time of a process, of the children it has buried and of its living descendants, in seconds."""
    try:
        ticks = sum(int(field) for field in _stat(pid)[11:15])
        lists = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for file in lists for child in _text(file).split()]
    except OSError:
        return 0.0
    return ticks / _TICKS_PER_S + sum(_used_s(child) for child in children)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # a thread that ended meanwhile; or a kernel without these files
        return ""
