"""What each rank posts in the shared memory beside its frames, without waiting for anybody.

A control block a rank, in cache lines of its own: how many frames it has published; its process, and whether it
left the group; which layers it went through in eval mode since its last exchange, forward and backward. Layers
are bits of a hash of their names: a clash can only make a rank that sleeps look guilty, and 512 bits make
it rare. After the blocks stands why the memory failed, once it has.
"""

import functools
import mmap
import os
import weakref
import zlib

from syncbn.norm.comm.fingerprint import RankLost, RanksDisagree
from syncbn.norm.comm.processes import Process

CONTROL_BYTES = 256
"""A control block; `kControlBytes` of native/exchange.cpp."""
FAILURE_BYTES = 1024
"""State, whether a rank was lost, and length, 8 bytes each; then the message."""
MESSAGE_BYTES = FAILURE_BYTES - 24
_PID, _STARTED, _LEFT = 8, 9, 10
"""Words of a control block; the next counts who sleeps until this rank publishes (native/exchange.cpp)."""
_PASSED = {False: 128, True: 192}


def board_bytes(world_size: int) -> int:
    """Bytes that the boards of `world_size` ranks need, in front of the slots."""
    return world_size * CONTROL_BYTES + FAILURE_BYTES


class Board:
    """The control blocks of a group, seen from one of its ranks.

    Args:
        memory: begins with `board_bytes` for this group.
        rank: of this process in the group.
        world_size: ranks in the group.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int) -> None:
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("q")
        self._rank, self._failure_at = rank, world_size * CONTROL_BYTES
        stride = CONTROL_BYTES // 8
        self._published = self._words[: world_size * stride : stride]
        self._own = rank * CONTROL_BYTES
        self._noted = self._backward_noted = False
        process = Process.own()
        self._words[rank * stride + _STARTED] = process.started
        self._words[rank * stride + _PID] = process.pid
        weakref.finalize(self, _leave, self._words, rank * stride)

    def published(self) -> list[int]:
        """Frames published so far, a rank."""
        return self._published.tolist()

    def process(self, rank: int) -> Process:
        """The process of `rank`."""
        first = rank * CONTROL_BYTES // 8
        return Process(self._words[first + _PID], self._words[first + _STARTED])

    def left(self, rank: int) -> bool:
        """Whether `rank` let go of the group."""
        return bool(self._words[rank * CONTROL_BYTES // 8 + _LEFT])

    def note(self, layer: str, backward: bool) -> bool:
        """Post that this rank goes through `layer` in eval mode; whether backward, the first time since `forget`."""
        byte, mask = _bit(layer)
        self._bytes[self._own + _PASSED[backward] + byte] |= mask
        self._noted = True
        first = backward and not self._backward_noted
        self._backward_noted |= backward
        return first

    def forget(self) -> None:
        """Take back what was noted: an exchange has brought all ranks together again."""
        if self._noted:
            first, last = self._own + _PASSED[False], self._own + CONTROL_BYTES
            self._bytes[first:last] = bytes(last - first)
            self._noted = self._backward_noted = False

    def seen_in(self, rank: int, layer: str) -> bool:
        """Whether `rank` went through `layer` in eval mode, forward or backward, since its last exchange."""
        return self._has(rank, layer, False) or self._has(rank, layer, True)

    def passed_alone(self, layer: str, other: int) -> bool:
        """Whether this rank went through `layer` in eval mode and rank `other` did not."""
        return self._has(self._rank, layer, False) and not self._has(other, layer, False)

    def passed(self, rank: int, layer: str) -> str:
        """The last that `rank`, other than this rank, did in eval mode with `layer`, as in `Absent`."""
        for backward, name in ((True, "backward"), (False, "forward")):
            if self._has(rank, layer, backward) and not self._has(self._rank, layer, backward):
                return name
        return ""

    def _has(self, rank: int, layer: str, backward: bool) -> bool:
        byte, mask = _bit(layer)
        return bool(self._bytes[rank * CONTROL_BYTES + _PASSED[backward] + byte] & mask)

    def failure(self) -> RanksDisagree | RankLost:
        """What the rank that gave up first has said."""
        lost, length = self._words[self._failure_at // 8 + 1 : self._failure_at // 8 + 3]
        message = self._bytes[self._failure_at + 24 :][:length].tobytes().decode(errors="replace")
        return RankLost(message) if lost else RanksDisagree(message)


@functools.lru_cache(maxsize=4096)
def _bit(layer: str) -> tuple[int, int]:
    byte, bit = divmod(zlib.crc32(layer.encode()) % 512, 8)
    return byte, 1 << bit


def _leave(words: memoryview, control: int) -> None:
    if words[control + _PID] == os.getpid():  # a forked child that ends leaves nothing
        words[control + _LEFT] = 1
