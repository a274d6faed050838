"""Frames through memory that the ranks of one machine share: no socket, no other thread to wake.

Each rank has two slots and a counter. It writes its frame into the slot of its parity, then raises its counter;
it reads the others' slots once their counters are as high. Two slots are enough: a rank can be one exchange
ahead of the slowest, not two, because for the second it has waited for every rank's first. The copying and the
waiting are one call into the native library (`native/exchange.cpp`), made without the interpreter's lock;
where some rank has no library another transport serves.

The call returns after a while although some rank has not come, so that this rank looks why (`Wait`). A rank
that gives up marks the memory: all ranks that are in an exchange of this group, or come to one, raise the same
message at once, because from then on the ranks are out of step. Headers that differ break nothing: all see them.

The memory never has a name, so nothing is left behind, however a process ends. In front stands a control block for
each rank, in cache lines of its own: how many frames it has published, and whether it left the group; behind the
blocks, why the memory failed; then the slots.
"""

import contextlib
import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Self

from torch import Tensor

from syncbn.norm.comm.fingerprint import HEADER_BYTES, RankLost, RanksDisagree, disagreement
from syncbn.norm.comm.processes import machine
from syncbn.norm.comm.transports.process_group import PAYLOAD_BYTES, Group
from syncbn.norm.comm.watchdog import Wait, give_up
from syncbn.norm.native import library

SLOT_BYTES = -(-(HEADER_BYTES + PAYLOAD_BYTES) // 64) * 64
SPIN_NS = 10_000
"""How long to spin where every rank has a core: two exchanges' worth (50 us cost 40 us more on busy cores)."""
LOOK_NS = 50_000_000
"""Time between two looks after the others; also how late an interrupt may be noticed."""
_CONTROL_BYTES = 256
"""A control block; `CONTROL_BYTES` of native/exchange.cpp."""
_LEFT = 10
"""The word of a control block beside the count; the next counts who sleeps until this rank publishes."""
_FAILURE_BYTES = 1024
"""State, whether a rank was lost, and length, 8 bytes each; then the message."""
_MESSAGE_BYTES = _FAILURE_BYTES - 24
_SECRET_BYTES, _OFFER_BYTES = 16, 128
"""Of a secret; and of a secret and a path."""
_SIGNATURE_BYTES = 128
"""Room at the end of the memory for what rank 0 signs it with."""
_DIFFER, _NOT_YET, _FAILED = 1, 2, 3
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p

_Destination = tuple[int, int, int]
"""Where payloads go: size, out, stride; `size` bytes of rank r to `out` + r * `stride`."""


class Ring(ctypes.Structure):
    """`SharedMemory` of `native/exchange.h`."""

    _fields_ = (
        ("rank", _INT),
        ("world_size", _INT),
        ("slot_bytes", _INT),
        ("spin_ns", _INT),
        ("round", _INT),
        ("controls", _POINTER),
        ("failure", _POINTER),
        ("slots", _POINTER),
    )


_NO_RING = Ring()
ELSEWHERE = ctypes.addressof(_NO_RING)
"""A ring without slots: a native call returns before the exchange, which its caller does."""


class SharedMemory:
    """A `Transport` over one mapping.

    Args:
        memory: zero bytes, the same pages on every rank.
        group: the ranks that share it.
    """

    def __init__(self, memory: mmap.mmap, group: Group) -> None:
        self._group, self._memory = group, memory
        self._world_size = world_size = group.world_size
        self._words = memoryview(memory).cast("q")
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._failure_at = world_size * _CONTROL_BYTES
        self._slots_at = self._failure_at + _FAILURE_BYTES
        spin_ns = SPIN_NS if len(os.sched_getaffinity(0)) >= world_size else 0
        places = (start, start + self._failure_at, start + self._slots_at)
        self.ring = Ring(group.rank, world_size, SLOT_BYTES, spin_ns, 0, *places)
        """What the library knows of the memory."""
        self.address = ctypes.addressof(self.ring)
        native = library()
        assert native is not None, "the handshake saw to it"
        self._native = native
        weakref.finalize(self, _leave, self._words, group.rank, os.getpid())

    @classmethod
    def over(cls, group: Group, willing: bool = True) -> Self | None:
        """The memory that all ranks of `group` share, None where some cannot or are not willing; a collective.

        Rank 0 makes nameless memory and tells where it can be opened; a rank that finds it there, signed by rank 0,
        is on the same machine.
        """
        willing = willing and library() is not None
        size = group.world_size * (_CONTROL_BYTES + 2 * SLOT_BYTES) + _FAILURE_BYTES
        secret = os.urandom(_SECRET_BYTES // 2).hex().encode()
        descriptor = _make(size, secret) if group.rank == 0 and willing else None
        try:
            path = "" if descriptor is None else f"/proc/{os.getpid()}/fd/{descriptor}"
            offer = group.all_tell((secret + path.encode()).ljust(_OFFER_BYTES, b"\0"))[0]
            secret, path = offer[:_SECRET_BYTES], offer[_SECRET_BYTES:].rstrip(b"\0").decode()
            memory = _map(Path(path), size, secret) if path and willing else None
            agreed = group.all_agree(memory is not None)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return cls(memory, group) if agreed and memory is not None else None

    def exchange(self, header: bytes, number: int, payload: Tensor) -> Tensor:
        """See `Transport`. A payload larger than a slot takes several rounds."""
        gathered = payload.new_empty((self._world_size, payload.numel()))
        source, out, total = payload.data_ptr(), gathered.data_ptr(), payload.nbytes
        for offset in range(0, max(total, 1), PAYLOAD_BYTES):
            size = min(total - offset, PAYLOAD_BYTES)
            published = (self.address, number, header, source + offset, size)
            if self._native.syncbn_exchange_publish(*published):
                raise self._failure()
            to = size, out + offset, total
            status = self._native.syncbn_exchange_wait(self.address, *to, LOOK_NS, 0)
            if status:
                self._settle(status, header, number, to)
        return gathered

    def complete(self, status: int, header: bytes, number: int, own: Tensor) -> Tensor:
        """Every rank's payload of a round that a native call entered with `own`, and left with a `status`."""
        gathered = own.new_empty((self._world_size, own.numel()))
        to = own.nbytes, gathered.data_ptr(), own.nbytes
        if status != _FAILED:
            status = self._native.syncbn_exchange_wait(self.address, *to, 0, 0)
        if status:
            self._settle(status, header, number, to)
        return gathered

    def _settle(self, status: int, header: bytes, number: int, to: _Destination) -> None:
        """Bring a round to its end that did not end at once."""
        self._group.turn = header, number
        if status == _NOT_YET:
            status = self._wait(to)
        if status == _DIFFER:
            headers = [self._header(rank) for rank in range(self._world_size)]
            raise disagreement(headers, self._group.rank, self._group.ranks)
        if status:
            raise self._failure()

    def _wait(self, to: _Destination) -> int:
        """Wait for the ranks that have not come, and look after them; the round's status."""
        status = _NOT_YET
        with Wait(self._group) as wait:
            try:
                while status == _NOT_YET:
                    missing = self._missing()
                    wait.look(missing, [rank for rank in missing if self._words[_left_at(rank)]])
                    status = self._native.syncbn_exchange_wait(self.address, *to, LOOK_NS, LOOK_NS)
            except BaseException as error:  # all other ranks raise what this one says
                text = give_up(self._group, error).encode()[:_MESSAGE_BYTES]
                lost = not isinstance(error, RanksDisagree)
                self._native.syncbn_exchange_fail(self.address, lost, text, len(text))
                raise
        return status

    def _missing(self) -> list[int]:
        """The ranks that have not published this round."""
        stride = _CONTROL_BYTES // 8
        published = self._words[: self._world_size * stride : stride].tolist()
        return [rank for rank, count in enumerate(published) if count < self.ring.round]

    def _header(self, rank: int) -> bytes:
        """The header that `rank` published in the present round."""
        at = self._slots_at + (self.ring.round % 2 * self._world_size + rank) * SLOT_BYTES
        return self._memory[at : at + HEADER_BYTES]

    def _failure(self) -> RanksDisagree | RankLost:
        """What the rank that gave up first has said."""
        at = self._failure_at
        lost, length = self._words[at // 8 + 1 : at // 8 + 3]
        message = self._memory[at + 24 :][:length].decode(errors="replace")
        return RankLost(message) if lost else RanksDisagree(message)


def _left_at(rank: int) -> int:
    """The word that says whether `rank` let go of the group."""
    return rank * _CONTROL_BYTES // 8 + _LEFT


def _leave(words: memoryview, rank: int, pid: int) -> None:
    if pid == os.getpid():  # a forked child that ends leaves nothing
        words[_left_at(rank)] = 1


def _make(size: int, secret: bytes) -> int | None:
    """The descriptor of `size` bytes, zero up to the signature after them; None where there can be none."""
    try:
        descriptor = os.memfd_create("syncbn")
    except (AttributeError, OSError):  # not Linux; or not permitted
        return None
    try:
        os.posix_fallocate(descriptor, 0, size + _SIGNATURE_BYTES)  # or a bus error, later
        os.pwrite(descriptor, secret + machine().encode(), size)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map(path: Path, size: int, secret: bytes) -> mmap.mmap | None:
    with contextlib.suppress(OSError, ValueError):
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size + _SIGNATURE_BYTES)
        if memory[-_SIGNATURE_BYTES:].rstrip(b"\0") == secret + machine().encode():
            return memory
    return None
