"""Frames through connections of our own between the ranks of a small group: no other thread to wake.

Whatever goes through gloo is read by a thread of gloo's, which must be woken on a busy core, and wakes the one that
waits for it: 2 ms an exchange within a layer, whether as a gather or as messages between two ranks. Here
the thread that waits reads by itself: 0.2 ms (2 ranks on 2 cores). Every rank sends its frame to all others, then
reads theirs in rank order, so the number of frames grows with the square of that of ranks: large groups gather
through gloo (`wire`), as do those whose ranks cannot connect (`connect`).

A rank takes the header first, then as many bytes as that announces: connections stay in step when headers differ.
A payload of more than `CHUNK_BYTES` goes in several, so that nobody waits for room in which to send.
"""

import os
import socket
import struct
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Self

from torch import Tensor

from syncbn.norm.comm import connect
from syncbn.norm.comm.connect import Connections
from syncbn.norm.comm.fingerprint import (
    CALL,
    HEADER_BYTES,
    Header,
    RankLost,
    RanksDisagree,
    disagreement,
    place_of,
)
from syncbn.norm.comm.transports.process_group import Wire, bytes_of

MESH_RANKS = 8
"""Ranks of a group that connect each with each: 8 on 2 cores exchange in 1.5 ms, against 17 ms through gloo."""
CHUNK_BYTES = 2**15
"""Sent before others' are read. Every layer of a ResNet-50 fits one; a connection holds two that nobody reads."""
_SEND_BUFFER = 4 * CHUNK_BYTES
_AT_ONCE = struct.pack("ii", 1, 0)
"""`struct linger` under which a connection that is closed is reset: the other end cannot send to it any more."""
_LONGEST_S = 2.0**20
"""What a socket can wait at most, about, in seconds."""


class Mesh:
    """A `Transport` over connections.

    Args:
        made: a connection with every other rank of `wire`.
        wire: to the ranks at their ends.
    """

    def __init__(self, made: Connections, wire: Wire) -> None:
        self._connections = dict(sorted(made.items()))
        self._rank, self._ranks, self._timeout_s = wire.rank, wire.ranks, wire.timeout_s
        self._failure = ""
        for connection in made.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            connection.settimeout(min(self._timeout_s, _LONGEST_S))
        weakref.finalize(self, connect.close, made)
        _meshes.add(self)

    @classmethod
    def over(cls, wire: Wire, willing: bool = True) -> Self | None:
        """Connections between all ranks of `wire`, None of too many, or where some cannot; a collective."""
        made = connect.connections(wire, willing) if wire.world_size <= MESH_RANKS else None
        return None if made is None else cls(made, wire)

    def begin(self, header: bytes, call: int, payload: Tensor) -> Callable[[], Tensor]:
        """See `Transport`. Once a rank is lost or late it stays failed, and the others are told.

        Raises:
            RanksDisagree: headers differ; or some rank did not come within the group's time limit.
            RankLost: some rank has closed its connection.
        """
        if self._failure:
            raise RanksDisagree(self._failure)
        front = CALL.pack(call) + header
        try:
            self._send(front + bytes_of(payload)[:CHUNK_BYTES], front)
        except BaseException as error:
            self._fail(error, front)
            raise
        return partial(self._rest, front, payload)

    def _rest(self, header: bytes, payload: Tensor) -> Tensor:
        try:
            headers, gathered = self._receive_all(header, payload)
        except BaseException as error:
            self._fail(error, header)
            raise
        if gathered is None:
            raise disagreement(headers, self._rank, self._ranks)
        return gathered

    def _fail(self, error: BaseException, header: bytes) -> None:
        """Whatever went wrong, the connections are out of step from here on."""
        known = isinstance(error, RanksDisagree | RankLost)
        place = place_of(header[CALL.size :], CALL.unpack_from(header)[0])
        here = f"rank {self._ranks[self._rank]} {place}"
        self._failure = str(error) if known else f"{here}, and was interrupted: {error!r}"
        self._hang_up()

    def _receive_all(self, header: bytes, payload: Tensor) -> tuple[list[bytes], Tensor | None]:
        """All headers; and all payloads, None where headers differ."""
        gathered = payload.new_empty((len(self._ranks), payload.numel()))
        own, rows = bytes_of(payload), bytes_of(gathered)
        size, headers = len(own), [header] * len(self._ranks)
        rows[self._rank * size :][:size] = own
        for rank in self._connections:
            headers[rank] = theirs = bytes(self._receive(rank, bytearray(HEADER_BYTES), header))
            if theirs == header:
                self._receive(rank, rows[rank * size :][: min(size, CHUNK_BYTES)], header)
            else:
                announced = Header.unpack(theirs[CALL.size :]).payload_bytes
                self._receive(rank, bytearray(min(announced, CHUNK_BYTES)), header)
        if any(theirs != header for theirs in headers):
            return headers, None
        for at in range(CHUNK_BYTES, size, CHUNK_BYTES):
            self._send(own[at : at + CHUNK_BYTES], header)
            for rank in self._connections:
                self._receive(rank, rows[rank * size :][:size][at : at + CHUNK_BYTES], header)
        return headers, gathered

    def _send(self, values: bytes | memoryview, header: bytes) -> None:
        """Send `values` to all others."""
        for rank, connection in self._connections.items():
            try:
                connection.sendall(values)
            except OSError as error:
                raise self._missing(rank, header, error) from error

    def _receive(
        self, rank: int, into: bytearray | memoryview, header: bytes
    ) -> bytearray | memoryview:
        """Fill `into` with what `rank` sent."""
        connection, rest = self._connections[rank], memoryview(into)
        try:
            while rest:
                read = connection.recv_into(rest)
                if read == 0:
                    raise ConnectionResetError
                rest = rest[read:]
        except OSError as error:
            raise self._missing(rank, header, error) from error
        return into

    def _missing(self, rank: int, header: bytes, error: OSError) -> RanksDisagree | RankLost:
        """What to say of `rank`, of which `error` was heard in the exchange of `header`."""
        place = place_of(header[CALL.size :], CALL.unpack_from(header)[0])
        waits = f"rank {self._ranks[self._rank]} {place} and waits for rank {self._ranks[rank]}: it"
        if isinstance(error, TimeoutError):
            return RanksDisagree(f"{waits} did not come within {self._timeout_s:g} s")
        return RankLost(f"{waits} died, failed, or let go of its process group")

    def _hang_up(self) -> None:
        """Have all others raise, now or when they come: what was sent to them is no longer to be taken."""
        for connection in self._connections.values():
            with suppress(OSError):  # it is closed already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        connect.close(self._connections)

    def let_go(self) -> None:
        """Close this process's side of the connections, which may be those of its parent."""
        connect.close(self._connections)

    def pass_by(self, layer: str, backward: bool) -> None:
        """Nothing: a rank that does not come is noticed at the group's time limit."""


_meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: a connection ends with its rank, not with the last worker that loads data for it."""
    for mesh in _meshes:
        mesh.let_go()


os.register_at_fork(after_in_child=_let_go)
