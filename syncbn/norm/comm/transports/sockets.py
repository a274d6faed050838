"""Frames through TCP connections between the ranks of a small group: no other thread to wake.

Whatever goes through gloo is read by a thread of gloo's, which must be woken on a busy core, and wakes the one that
waits for it: 2 ms an exchange within a layer, whether as a gather or as messages between two ranks. Here
the thread that waits reads by itself: 0.2 ms (2 ranks on 2 cores). Every rank sends its frame to all others, then
reads theirs in rank order, so the number of frames grows with the square of that of ranks: large groups gather
through gloo, as do those whose ranks cannot all connect.

A rank reads the header first, then as many bytes as that announces: connections stay in step when headers differ.
A payload of more than `CHUNK_BYTES` goes in several, so that no rank waits for room in which to send.

Connections lie on the interface that gloo uses (`GLOO_SOCKET_IFNAME`, else the address of the host's name). A rank
listens only while they are made, and accepts those alone that know its secret, which the group was told. Nothing is
encrypted, so where gloo is told to (`GLOO_DEVICE_TRANSPORT`), there are none.
"""

import errno
import hmac
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Self

from torch import Tensor

from syncbn.norm.comm.fingerprint import (
    HEADER_BYTES,
    NUMBER,
    RanksDisagree,
    disagreement,
    unpacked,
)
from syncbn.norm.comm.transports.process_group import Group, bytes_of
from syncbn.norm.comm.watchdog import Wait, give_up

MESH_RANKS = 8
"""Ranks of a group that connect each with each: 8 on 2 cores exchange in 1.5 ms, against 17 ms through gloo."""
CHUNK_BYTES = 2**15
"""Sent before others' are read. Every layer of a ResNet-50 fits one; a connection holds two that nobody reads."""
CONNECT_S = 3.0
"""How long ranks try: what drops their packets silently must not hold them up for long."""
SECRET_BYTES = 16
_SEND_BUFFER = 4 * CHUNK_BYTES
_LOOK_S = 1.0
"""How long to wait before looking why the others do not come."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""`struct linger` under which a connection that is closed is reset: the other end cannot send to it any more."""
_OFFER = struct.Struct(f"<q64s{SECRET_BYTES}s")
"""Port, or 0 of a rank that does not listen; address; secret."""
_HELLO = struct.Struct(f"<q{SECRET_BYTES}s")
"""The rank that connects, and the secret of the one it connects to."""
_SIOCGIFADDR = 0x8915
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)

Connections = dict[int, socket.socket]
"""By the other end's rank in the group."""


class Sockets:
    """A `Transport` over connections.

    Args:
        made: a connection with every other rank of `group`.
        group: the ranks at their ends.
    """

    def __init__(self, made: Connections, group: Group) -> None:
        self._connections = dict(sorted(made.items()))
        self._group, self._failure = group, ""
        for connection in made.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            connection.settimeout(_LOOK_S)
        weakref.finalize(self, close, made)
        _all.add(self)

    @classmethod
    def over(cls, group: Group, willing: bool = True) -> Self | None:
        """Connections between all ranks of `group`, None of too many or where some cannot; a collective."""
        if group.world_size > MESH_RANKS:
            return None
        secret, made = os.urandom(SECRET_BYTES), None
        with (_listener() if willing else None) or nullcontext() as listener:
            host, port = listener.getsockname()[:2] if listener else ("", 0)
            told = group.all_tell(_OFFER.pack(port, host.encode(), secret))
            offers = [_OFFER.unpack(offer) for offer in told]
            if listener and all(port for port, _, _ in offers):
                made = _made(listener, offers, group.rank)
            agreed = group.all_agree(made is not None)
        if agreed and made is not None:
            return cls(made, group)
        close(made or {})
        return None

    def exchange(self, header: bytes, number: int, payload: Tensor) -> Tensor:
        """See `Transport`. Once a rank is lost or late it stays failed, and the others are told.

        Raises:
            RanksDisagree: headers differ; or some rank did not come.
            RankLost: the connection to some rank was closed.
            RuntimeError: this rank cannot use a connection.
        """
        if self._failure:
            raise RanksDisagree(self._failure)
        try:
            headers, gathered = self._frames(header, number, payload)
        except BaseException as error:
            self._failure = give_up(self._group, error)
            self._hang_up()
            raise
        if gathered is None:
            raise disagreement(headers, self._group.rank, self._group.ranks)
        return gathered

    def _frames(
        self, header: bytes, number: int, payload: Tensor
    ) -> tuple[list[bytes], Tensor | None]:
        """All headers; and all payloads, None where headers differ."""
        rank, front, own = self._group.rank, NUMBER.pack(number) + header, bytes_of(payload)
        self._group.turn = header, number
        self._send(front + own[:CHUNK_BYTES])
        # while frames travel: one that is waited for costs 40 us more than one that is there
        gathered = payload.new_empty((self._group.world_size, payload.numel()))
        rows, size, headers = bytes_of(gathered), len(own), [front] * self._group.world_size
        rows[rank * size :][:size] = own
        for rank in self._connections:
            headers[rank] = theirs = bytes(self._receive(rank, bytearray(HEADER_BYTES)))
            if theirs == front:
                self._receive(rank, rows[rank * size :][: min(size, CHUNK_BYTES)])
            else:
                announced = unpacked(theirs[NUMBER.size :]).payload_bytes
                self._receive(rank, bytearray(min(announced, CHUNK_BYTES)))
        if any(theirs != front for theirs in headers):
            return headers, None
        for at in range(CHUNK_BYTES, size, CHUNK_BYTES):
            self._send(own[at : at + CHUNK_BYTES])
            for rank in self._connections:
                self._receive(rank, rows[rank * size :][:size][at : at + CHUNK_BYTES])
        return headers, gathered

    def _send(self, values: bytes | memoryview) -> None:
        """Send `values` to all others."""
        for rank, connection in self._connections.items():
            rest = memoryview(values)
            while rest:
                rest = rest[self._patiently(rank, connection.send, rest) :]

    def _receive(self, rank: int, into: bytearray | memoryview) -> bytearray | memoryview:
        """Fill `into` with what `rank` sent."""
        rest = memoryview(into)
        while rest:
            read = self._patiently(rank, self._connections[rank].recv_into, rest)
            if read == 0:
                raise self._lost(rank, "it closed the connection")
            rest = rest[read:]
        return into

    def _patiently(self, rank: int, move: Callable[[memoryview], int], values: memoryview) -> int:
        """What `move` returns, once the connection to `rank` lets it."""
        moved = self._attempt(rank, move, values)
        if moved is None:
            with Wait(self._group) as wait:
                while moved is None:
                    wait.look([rank])
                    moved = self._attempt(rank, move, values)
        return moved

    def _attempt(
        self, rank: int, move: Callable[[memoryview], int], values: memoryview
    ) -> int | None:
        """What `move` returns; None where the connection to `rank` does not let it yet."""
        try:
            return move(values)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                return None
            if isinstance(error, ConnectionError) or error.errno in _UNREACHABLE:
                raise self._lost(rank, str(error)) from error
            here, other = self._group.here(), self._group.ranks[rank]
            raise RuntimeError(
                f"{here} and cannot use its socket to rank {other}: {error}"
            ) from error

    def _lost(self, rank: int, why: str) -> RuntimeError:
        """The error of a connection to `rank` that is closed; what that rank said, if it gave up."""
        with Wait(self._group) as wait:
            wait.missing = [self._group.ranks[rank]]
            return wait.lost(why)

    def _hang_up(self) -> None:
        """Have all others raise, now or when they come: what was sent to them is no longer to be taken."""
        for connection in self._connections.values():
            with suppress(OSError):  # it is closed already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        close(self._connections)


def close(made: Connections) -> None:
    """Close connections that are of no use."""
    for connection in made.values():
        connection.close()


def _listener() -> socket.socket | None:
    """A socket that listens where gloo would; None where there is none, or where gloo would not talk plainly."""
    if os.environ.get("GLOO_DEVICE_TRANSPORT", "TCP") != "TCP":
        return None
    with suppress(OSError):
        return socket.create_server((_address(), 0))
    return None


def _address() -> str:
    """The IPv4 address on which gloo would listen: this machine's own, where its name stands for none.

    Raises:
        OSError: the interface has none.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not interface:
        with suppress(OSError, UnicodeError):  # the latter of a name that no resolver takes
            return socket.gethostbyname(socket.gethostname())
        return "127.0.0.1"
    import fcntl  # not everywhere

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24])


def _made(
    listener: socket.socket, offers: list[tuple[int, bytes, bytes]], rank: int
) -> Connections | None:
    """Connections with all ranks, made to those before this one and accepted from those behind it."""
    made: Connections = {}
    try:
        for other, (port, host, secret) in enumerate(offers[:rank]):
            place = host.rstrip(b"\0").decode(), port
            made[other] = socket.create_connection(place, CONNECT_S)
            made[other].sendall(_HELLO.pack(rank, secret))
        deadline = time.monotonic() + CONNECT_S
        while len(made) < len(offers) - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            accepted, _ = listener.accept()
            _admit(accepted, offers[rank][2], made)
    except OSError:
        close(made)
        return None
    return made


def _admit(accepted: socket.socket, secret: bytes, made: Connections) -> None:
    """Add a connection to those `made`, if it comes from a rank of the group."""
    accepted.settimeout(CONNECT_S / 4)  # a stranger may say nothing, and others wait behind it
    hello = b""
    with suppress(OSError):
        while len(hello) < _HELLO.size and (more := accepted.recv(_HELLO.size - len(hello))):
            hello += more
        other, told = _HELLO.unpack(hello.ljust(_HELLO.size, b"\0"))
        if hmac.compare_digest(told, secret):
            made[other] = accepted
            return
    accepted.close()


_all: weakref.WeakSet[Sockets] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: a connection ends with its rank, not with the last worker that loads data for it."""
    for sockets in _all:
        close(sockets._connections)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
