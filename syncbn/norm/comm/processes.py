"""What another process of this machine, and a thread of this process, is doing."""

import dis
import gc
import os
import socket
import sys
import threading
import time
from itertools import dropwhile, takewhile
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

_COLLECTIVES = (
    "torch.distributed.distributed_c10d",
    "torch.distributed.c10d_logger",  # the wrapper around each of them
    "torch.distributed.utils",
    "torch.distributed._functional_collectives",
    "torch.nn.parallel.distributed",
)
"""Modules of torch whose functions block for other ranks and for nothing else."""
_OPERATORS = "torch._ops"
"""That of the frames around an operator, such as one that waits for a functional collective."""
_SYMMETRIC = ("all_", "barrier", "monitored_barrier", "new_group", "reduce_scatter", "split_group")
"""How the names of collectives begin that no rank leaves before every rank has entered them."""


class Process(NamedTuple):
    """A process, told from a later one of the same id by when it started.

    Attributes:
        pid: its id.
        started: in ticks since the machine's start; 0 where that is unknown.
        machine: where that id means something; "" where that is unknown.
    """

    pid: int
    started: int
    machine: str

    @staticmethod
    def own() -> "Process":
        """This process."""
        try:
            return Process(os.getpid(), int(_stat(os.getpid())[19]), machine())
        except OSError:
            return Process(os.getpid(), 0, "")

    def state(self) -> str:
        """Linux's letter for its main thread; "X" once it exited, "" where this rank cannot tell.

        It cannot tell of a process elsewhere, nor of any while it is out of file descriptors.
        """
        if not self.machine or self.machine != machine():
            return ""
        try:
            fields = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return "X"
        except OSError:
            return ""
        lives = fields[0] not in "ZX" and self.started in (0, int(fields[19]))
        return fields[0] if lives else "X"


def machine() -> str:
    """The machine since its start, and the namespace of process ids on it; "" where this is unknown."""
    try:
        return f"{_boot()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def host() -> str:
    """The machine since its start, and its name: different where ranks run on different hosts."""
    try:
        return f"{_boot()} {socket.gethostname()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int, thread: str = "") -> list[str]:
    """The fields of a process's or thread's `stat` from the third on; the second may hold anything."""
    return Path(f"/proc/{pid}/{thread}stat").read_text().rpartition(")")[2].split()


class Collective(NamedTuple):
    """A collective that a rank is inside of.

    Attributes:
        name: the same on all ranks that are inside the same one.
        ranks: the global ranks that take part.
        symmetric: whether no rank leaves it before every rank has entered it.
    """

    name: str
    ranks: list[int]
    symmetric: bool


class Activity(NamedTuple):
    """What a thread is doing.

    Attributes:
        text: in words that follow "it".
        collective: None of a thread that runs, or blocks in something else.
    """

    text: str
    collective: Collective | None = None


class Thread:
    """The calling thread, seen from another one later."""

    def __init__(self) -> None:
        self._ident, self._native = threading.get_ident(), threading.get_native_id()

    def frame(self) -> FrameType | None:
        """The innermost frame of Python that it runs."""
        return sys._current_frames().get(self._ident)

    def used_s(self) -> float:
        """Processor time that it has used, in seconds.

        Raises:
            AttributeError, OSError: the system does not tell.
        """
        return time.clock_gettime(time.pthread_getcpuclockid(self._ident))

    def sleeps(self) -> bool:
        """Whether it waits for something other than a processor or a disk, as far as the system tells."""
        try:
            return _stat(os.getpid(), f"task/{self._native}/")[0] in "SI"
        except OSError:
            return False


def activity(frame: FrameType) -> Activity:
    """What a thread whose innermost frame is `frame` is doing, if it stays there."""
    at = _place(frame)
    if frame.f_code.co_name == "_engine_run_backward":
        text = f"is blocked in a backward pass, as in a reduction of gradients, {at}"
        return Activity(text, _of_backward())
    frames = dropwhile(lambda one: _module(one) == _OPERATORS, _outwards(frame))
    inside = list(takewhile(lambda one: _module(one) in _COLLECTIVES, frames))
    functions = [one.f_code.co_name for one in inside if _module(one) != _COLLECTIVES[1]]
    if functions:
        text = f"is blocked in {functions[-1]} of torch.distributed, {at}"
        return Activity(text, _of_function(functions[-1], inside))
    if _waits_for_work(frame):
        return Activity(f"is blocked in a collective, {at}", Collective("work", _world(), False))
    return Activity(f"was last seen {at}")


def _outwards(frame: FrameType | None) -> list[FrameType]:
    """`frame` and its callers."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _place(frame: FrameType) -> str:
    """Where the innermost code of the user's is, of what `frame` runs."""
    frames = _outwards(frame)
    ours = ("torch.", "syncbn.norm.")
    frame = next((one for one in frames if not f"{_module(one)}.".startswith(ours)), frame)
    code = frame.f_code
    return f"at {Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"


def _world() -> list[int]:
    return list(range(dist.get_world_size()))


def _of_group(name: str, group: ProcessGroup, symmetric: bool) -> Collective:
    ranks = dist.get_process_group_ranks(group)
    return Collective(f"{name} of group {group.group_name}", ranks, symmetric)


def _of_function(name: str, inside: list[FrameType]) -> Collective:
    """The collective that the function `name` of torch.distributed waits in; its group is among the variables."""
    values = [one.f_locals.get("group") or one.f_locals.get("process_group") for one in inside]
    values += [getattr(one.f_locals.get("self"), "process_group", None) for one in inside]
    group = next((one for one in values if isinstance(one, ProcessGroup)), dist.group.WORLD)
    assert group is not None, "there is no collective without a group"
    return _of_group(name, group, name.lstrip("_").startswith(_SYMMETRIC))


def _of_backward() -> Collective:
    """The reduction that a backward pass waits for, of the models that reduce their gradients in it."""
    models = (one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel))
    groups = {model.process_group for model in models}
    if len(groups) == 1 and isinstance(group := groups.pop(), ProcessGroup):
        return _of_group("backward", group, symmetric=True)
    return Collective("backward", _world(), symmetric=False)


def _waits_for_work(frame: FrameType) -> bool:
    """Whether `frame` has called `wait` of a `torch.distributed.Work`."""
    done = [one for one in dis.get_instructions(frame.f_code) if one.offset < frame.f_lasti]
    loads = [one for one in done if one.opname.startswith("LOAD_")]
    if len(loads) < 2 or loads[-1].argval != "wait":
        return False
    if isinstance(frame.f_locals.get(loads[-2].argval), dist.Work):
        return True
    names = [one.argval for one in loads if _line(one) >= _line(loads[-1])]  # of one expression
    return any(isinstance(name, str) and callable(getattr(dist, name, None)) for name in names)


def _line(instruction: dis.Instruction) -> int:
    """The first line of the expression that `instruction` belongs to."""
    return (instruction.positions and instruction.positions.lineno) or 0
