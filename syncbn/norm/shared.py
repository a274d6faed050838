"""Frames through memory that the ranks of one machine share: no socket, no other thread to wake.

Each rank has two slots and a counter. It writes its frame into the slot of its parity, then raises its counter;
it reads the others' slots once their counters are as high. Two slots are enough: a rank can be one exchange
ahead of the slowest, not two, because for the second it has waited for everybody's first.

Nothing is left behind, however a process ends: the memory never has a name, and goes with those who map it.
The order "frame first, counter second" is what x86-64 promises of plain stores; elsewhere the group serves.
"""

import contextlib
import mmap
import os
import platform
import time
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from syncbn.norm.wire import Wire

LINE = 64
"""Bytes of a cache line: counters that share one slow each other down."""
SPINS = 2000
"""Looks at the counters before the core is offered to others: about 0.2 ms, a few exchanges' worth."""
PATIENCE = 100_000
"""Looks after which a waiting rank sleeps between two: whoever is that late will not be missed by 0.1 ms."""
OFFER_BYTES = 128
"""Room for a secret and a path."""
SIGNATURE_BYTES = 64
"""Room at the end of the memory for what rank 0 signs it with."""


class SharedMemory:
    """A `Transport` over one mapping of W counters, W process ids and 2 x W slots.

    Args:
        memory: the mapping, the same pages on every rank.
        wire: to the ranks that share it.
        frame_bytes: size of a slot.
    """

    def __init__(self, memory: mmap.mmap, wire: Wire, frame_bytes: int) -> None:
        self.rank, self.ranks, self.world_size = wire.rank, wire.ranks, wire.world_size
        self.timeout_s = wire.timeout_s
        words = memoryview(memory).cast("q")
        stride = LINE // 8
        self._counters = words[: self.world_size * stride : stride]
        self._pids = words[1 : self.world_size * stride : stride]
        data = torch.frombuffer(memory, dtype=torch.uint8)[
            self.world_size * LINE : -SIGNATURE_BYTES
        ]
        self._slots = data.view(2, self.world_size, frame_bytes)
        self._pids[self.rank] = os.getpid()
        self._count = 0
        self._spins = SPINS if len(os.sched_getaffinity(0)) >= self.world_size else 0

    @staticmethod
    def size(world_size: int, frame_bytes: int) -> int:
        """Bytes that `world_size` ranks need."""
        return world_size * (LINE + 2 * frame_bytes) + SIGNATURE_BYTES

    @classmethod
    def shared_over(cls, wire: Wire, frame_bytes: int, willing: bool = True) -> Self | None:
        """The memory that all ranks of `wire` share, or None where some cannot or are not willing; a collective.

        Rank 0 makes nameless memory and tells where it can be opened; a rank that finds it there, signed by
        rank 0, is on the same machine. All of them must, or none uses it.
        """
        frame_bytes = -(-frame_bytes // LINE) * LINE
        size = cls.size(wire.world_size, frame_bytes)
        secret = os.urandom(8).hex().encode()
        descriptor = _make(size, secret) if wire.rank == 0 and willing else None
        try:
            path = "" if descriptor is None else f"/proc/{os.getpid()}/fd/{descriptor}"
            offer = (secret + path.encode()).ljust(OFFER_BYTES, b"\0")
            offers = wire.gather(torch.frombuffer(bytearray(offer), dtype=torch.uint8), OFFER_BYTES)
            secret, slash, rest = bytes(offers[0].tolist()).rstrip(b"\0").partition(b"/")
            memory = _map(Path((slash + rest).decode()), size, secret) if rest and willing else None
            verdicts = wire.gather(torch.tensor([memory is not None], dtype=torch.uint8), 1)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return cls(memory, wire, frame_bytes) if memory and bool(verdicts.all()) else None

    def gather(self, frame: Tensor, size: int, doing: object = "") -> Tensor:
        """Every rank's `frame`, uint8, no larger than a slot, as `(W, k)`; `size` does not matter here.

        Raises:
            RuntimeError: a rank died, or did not come within the group's time limit.
        """
        del size
        self._count += 1
        slots = self._slots[self._count % 2]
        slots[self.rank, : frame.numel()] = frame
        self._counters[self.rank] = self._count
        self._wait(doing)
        return slots[:, : frame.numel()].clone()

    def _wait(self, doing: object) -> None:
        """Return when every rank has written its frame of this round."""
        count, counters = self._count, self._counters
        waited_for = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = 0.0
        spins = 0
        while waited_for:
            if counters[waited_for[-1]] >= count:
                waited_for.pop()
                continue
            spins += 1
            if spins > self._spins:
                now = time.monotonic()
                deadline = deadline or now + self.timeout_s
                self._look_after(waited_for, doing, now > deadline)
                time.sleep(0 if spins < PATIENCE else 1e-4)

    def _look_after(self, ranks: list[int], doing: object, late: bool) -> None:
        """Raise where one of `ranks` has died, or all are too late."""
        dead = [rank for rank in ranks if not _lives(self._pids[rank])]
        if not dead and not late:
            return
        who, me = self.ranks[(dead or ranks)[-1]], self.ranks[self.rank]
        why = "it died" if dead else f"it did not come within {self.timeout_s:g} s"
        raise RuntimeError(f"rank {me} {doing} and waits for rank {who}: {why}")


def _lives(pid: int) -> bool:
    """Whether the process runs; one that nobody has buried yet does not. 0: it has not told its id."""
    try:
        return (
            pid == 0
            or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        )
    except OSError:
        return False


def _make(size: int, secret: bytes) -> int | None:
    """The descriptor of `size` bytes, zero but for the signature at their end; None where there can be none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        descriptor = os.memfd_create("syncbn")
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)  # full memory shows here, not as a bus error later
        os.pwrite(descriptor, secret + _namespace(), size - SIGNATURE_BYTES)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map(path: Path, size: int, secret: bytes) -> mmap.mmap | None:
    with contextlib.suppress(OSError, ValueError):
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
        if memory[-SIGNATURE_BYTES:].rstrip(b"\0") == secret + _namespace():
            return memory
    return None


def _namespace() -> bytes:
    """Where this process's id means something; ranks elsewhere could not tell whether this one lives."""
    return os.fsencode(Path("/proc/self/ns/pid").readlink())
