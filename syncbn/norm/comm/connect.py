"""Connections between the ranks of a small group, one a pair, or the knowledge that there can be none.

Gloo's connections belong to threads of its own. These are for whoever asks: they lie on the interface that gloo uses
(`GLOO_SOCKET_IFNAME`, else what the host's name stands for), and each was made by somebody who learnt the
secret of the rank at its other end through the group. A rank listens only while they are made. All ranks of a group
must be connected with each other, or none is. Nothing is encrypted, so where gloo is told to
(`GLOO_DEVICE_TRANSPORT`), there are none.
"""

import hmac
import os
import socket
import struct
import time
from contextlib import suppress

import torch

from syncbn.norm.comm.transports.process_group import Wire

CONNECT_S = 3.0
"""How long ranks try: what drops their packets without a word must not hold them up for long."""
SECRET_BYTES = 16
_OFFER = struct.Struct(f"<q64s{SECRET_BYTES}s")
"""Port, or 0 of a rank that does not listen; address; secret."""
_HELLO = struct.Struct(f"<q{SECRET_BYTES}s")
"""Who connects, and the secret of whom it connects to."""
_SIOCGIFADDR = 0x8915

Connections = dict[int, socket.socket]
"""By the other end's rank in the group."""


def connections(wire: Wire, willing: bool = True) -> Connections | None:
    """Connections with all other ranks of `wire`, None where some rank lacks one or is not willing; a collective."""
    secret = os.urandom(SECRET_BYTES)
    listener = _listener() if willing else None
    made: Connections | None = None
    try:
        host, port = listener.getsockname()[:2] if listener else ("", 0)
        offer = bytearray(_OFFER.pack(port, host.encode(), secret))
        gathered = wire.all_gather(torch.frombuffer(offer, dtype=torch.uint8))
        offers = [_OFFER.unpack(bytes(row)) for row in gathered.tolist()]
        if listener and all(port for port, _, _ in offers):
            made = _made(listener, offers, wire.rank)
        verdicts = wire.all_gather(torch.tensor([made is not None], dtype=torch.uint8))
    finally:
        if listener:
            listener.close()
    if made is not None and not verdicts.all():
        close(made)
        return None
    return made


def close(made: Connections) -> None:
    """Let go of connections that are of no use."""
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
