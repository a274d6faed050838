"""Frames through memory that the ranks of one machine share: no socket, no other thread to wake.

Each rank has two slots and a counter. It writes its frame into the slot of its parity, then raises its counter;
it reads the others' slots once their counters are as high. Two slots are enough: a rank can be one exchange
ahead of the slowest, not two, because for the second it has waited for everybody's first. The copying and the
waiting are one call into the native library (`native/exchange.cpp`), made without the interpreter's lock;
where some rank has no library the group serves.

The call returns after a while although nobody came, so that this rank looks after the others (`patrol`). A rank
that gives up marks the memory: whoever is in an exchange of this group, or comes to one, raises the same
message at once, because from then on the ranks are out of step. Headers that differ break nothing: all see them.
"""

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from typing import NamedTuple, Self

from torch import Tensor

from syncbn.norm.comm.board import MESSAGE_BYTES, Board, board_bytes
from syncbn.norm.comm.fingerprint import (
    CALL,
    FORWARD,
    HEADER_BYTES,
    Header,
    RankLost,
    RanksDisagree,
    disagreement,
    passed_by,
    place_of,
)
from syncbn.norm.comm.patrol import Absent, Patrol, linger
from syncbn.norm.comm.transports.mapping import shared_over
from syncbn.norm.comm.transports.process_group import PAYLOAD_BYTES, Wire
from syncbn.norm.native import library

SLOT_BYTES = -(-(HEADER_BYTES + PAYLOAD_BYTES) // 64) * 64
SPIN_NS = 10_000
"""How long to spin where every rank has a core: two exchanges' worth (50 us cost 40 us more on busy cores)."""
LOOK_NS = 50_000_000
"""Time between two looks after the others; also how late an interrupt may be noticed."""
_DIFFER, _NOT_YET, _FAILED = 1, 2, 3
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Ring(ctypes.Structure):
    """`SyncbnRing` of `native/exchange.cpp`."""

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


def ring_of(wire: Wire) -> Ring:
    """The ring of a group that shares no memory: a native call then leaves the exchange to its caller."""
    return Ring(wire.rank, wire.world_size)


class _Destination(NamedTuple):
    """Where one frame's payloads go: `size` bytes of rank r to `out` + r * `stride`."""

    size: int
    out: int
    stride: int


class SharedMemory:
    """A `Transport` over one mapping.

    Args:
        memory: zero bytes, `size` of them, the same pages on every rank.
        wire: to the ranks that share it.
    """

    def __init__(self, memory: mmap.mmap, wire: Wire) -> None:
        self._wire, self._memory = wire, memory
        self._world_size, self._timeout_s = wire.world_size, wire.timeout_s
        self._board = Board(memory, wire.rank, wire.world_size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._slots_at = board_bytes(wire.world_size)
        failure = start + self._slots_at - board_bytes(0)
        spin_ns = SPIN_NS if len(os.sched_getaffinity(0)) >= wire.world_size else 0
        places = (start, failure, start + self._slots_at)
        self.ring = Ring(wire.rank, wire.world_size, SLOT_BYTES, spin_ns, 0, *places)
        """What the library knows of the memory."""
        self._address = ctypes.addressof(self.ring)
        native = _native()
        assert native is not None, "the handshake saw to it"
        self._native = native

    @staticmethod
    def size(world_size: int) -> int:
        """Bytes that `world_size` ranks need."""
        return board_bytes(world_size) + 2 * world_size * SLOT_BYTES

    @classmethod
    def over(cls, wire: Wire, willing: bool = True) -> Self | None:
        """The memory that all ranks of `wire` share, or None; a collective (see `memory.shared_over`)."""
        willing = willing and _native() is not None
        memory = shared_over(wire, cls.size(wire.world_size), willing)
        return None if memory is None else cls(memory, wire)

    def begin(self, header: bytes, call: int, payload: Tensor) -> Callable[[], Tensor]:
        """See `Transport`. A payload larger than a slot takes several rounds, of which the first is begun."""
        self._publish(header, call, payload, 0)
        return lambda: self._rest(header, call, payload)

    def _publish(self, header: bytes, call: int, payload: Tensor, offset: int) -> None:
        """Enter a round with the bytes of `payload` from `offset` on, as many as a slot holds."""
        size = min(payload.nbytes - offset, PAYLOAD_BYTES)
        source = payload.data_ptr() + offset
        if self._native.syncbn_exchange_publish(self._address, call, header, source, size):
            raise self._board.failure()

    def _rest(self, header: bytes, call: int, payload: Tensor) -> Tensor:
        """Every rank's payload, once the first round is entered."""
        gathered = payload.new_empty((self._world_size, payload.numel()))
        out, total = gathered.data_ptr(), payload.nbytes
        for offset in range(0, max(total, 1), PAYLOAD_BYTES):
            if offset:
                self._publish(header, call, payload, offset)
            to = _Destination(min(total - offset, PAYLOAD_BYTES), out + offset, total)
            status = self._native.syncbn_exchange_wait(self._address, *to, LOOK_NS, 0)
            if status:
                self._settle(status, header, call, to)
        return gathered

    def brought(self, status: int, header: bytes, call: int, own: Tensor) -> Tensor:
        """Every rank's payload of a round that a whole pass entered with `own`, and left with a `status`."""
        gathered = own.new_empty((self._world_size, own.numel()))
        to = _Destination(own.nbytes, gathered.data_ptr(), own.nbytes)
        if status != _FAILED:
            status = self._native.syncbn_exchange_wait(self._address, *to, 0, 0)
        if status:
            self._settle(status, header, call, to)
        return gathered

    def forget(self) -> None:
        """Take back what was noted of eval mode: an exchange has brought all ranks together again."""
        self._board.forget()

    def _settle(self, status: int, header: bytes, call: int, to: _Destination) -> None:
        """Bring a round to its end that did not end at once."""
        here = f"rank {self._wire.ranks[self._wire.rank]} {place_of(header, call)}"
        try:
            patrol, layer = Patrol(here, self._timeout_s), Header.unpack(header).layer
            while status == _NOT_YET:
                patrol.look(self._absent(layer))
                status = self._native.syncbn_exchange_wait(self._address, *to, LOOK_NS, LOOK_NS)
        except BaseException as error:
            self._fail(error, here)
            raise
        if status == _DIFFER:
            self._board.forget()
            headers = [self._header(r, self.ring.round) for r in range(self._world_size)]
            raise disagreement(headers, self._wire.rank, self._wire.ranks)
        if status:
            raise self._board.failure()

    def _absent(self, layer: str) -> list[Absent]:
        """The ranks that have not published this round."""
        board, ranks = self._board, self._wire.ranks
        return [
            Absent(ranks[rank], board.process(rank), board.passed(rank, layer), board.left(rank))
            for rank, count in enumerate(board.published())
            if count < self.ring.round
        ]

    def _header(self, rank: int, round_: int) -> bytes:
        """The header that `rank` published in a round that this rank has not left."""
        at = self._slots_at + (round_ % 2 * self._world_size + rank) * SLOT_BYTES
        return self._memory[at : at + HEADER_BYTES]

    def _fail(self, error: BaseException, here: str) -> None:
        """Let every other rank raise what made this one give up."""
        known = isinstance(error, RanksDisagree | RankLost)
        message = str(error) if known else f"{here}, and was interrupted there: {error!r}"
        text = message.encode()[:MESSAGE_BYTES]
        lost = not isinstance(error, RanksDisagree)
        self._native.syncbn_exchange_fail(self._address, lost, text, len(text))

    def pass_by(self, layer: str, backward: bool) -> None:
        """Note that this rank goes through `layer` in eval mode.

        Raises:
            RanksDisagree: in the backward pass, where another rank waits for this one in the forward pass of a
                layer that this one has gone through in eval mode and that one has not.
        """
        first = self._board.note(layer, backward)
        if backward:
            if first:
                linger(lambda: self._unknown(layer))
            for rank, count in enumerate(self._board.published()):
                if count > self.ring.round:
                    self._refuse(layer, rank, count)

    def _unknown(self, layer: str) -> bool:
        """Whether some rank is neither in an exchange that this one has not entered nor seen in `layer` itself."""
        board, own, round_ = self._board, self._wire.rank, self.ring.round
        return any(
            rank != own and count <= round_ and not board.seen_in(rank, layer)
            for rank, count in enumerate(board.published())
        )

    def _refuse(self, layer: str, waiting: int, round_: int) -> None:
        """Raise where rank `waiting` waits for what this rank has gone through in eval mode."""
        data = self._header(waiting, round_)
        call, header = CALL.unpack_from(data)[0], Header.unpack(data[CALL.size :])
        if header.kind != FORWARD or not self._board.passed_alone(header.layer, waiting):
            return
        own, other = self._wire.ranks[self._wire.rank], self._wire.ranks[waiting]
        error = passed_by(own, layer, f"rank {other} {header.place(call)}")
        self._fail(error, "")
        raise error


@functools.cache
def _native() -> ctypes.CDLL | None:
    """The native library, where it has exchanges."""
    found = library()
    if not hasattr(found, "syncbn_exchange_publish"):
        return None
    assert found is not None
    to = (_INT, _POINTER, _INT)
    found.syncbn_exchange_publish.argtypes = (_POINTER, _INT, ctypes.c_char_p, _POINTER, _INT)
    found.syncbn_exchange_wait.argtypes = (_POINTER, *to, _INT, _INT)
    found.syncbn_exchange_fail.argtypes = (_POINTER, _INT, ctypes.c_char_p, _INT)
    return found
