"""Nameless memory that the ranks of one machine share, or the knowledge that they cannot.

Nothing is left behind, however a process ends: the memory never has a name, and goes with those who map it. All
ranks of a group must be able to map it, be willing, and have the native library, or none uses it.
"""

import contextlib
import mmap
import os
from pathlib import Path

import torch

from syncbn.norm.comm.processes import machine
from syncbn.norm.comm.transports.process_group import Wire

OFFER_BYTES = 128
"""Room for a secret and a path."""
SIGNATURE_BYTES = 128
"""Room at the end of the memory for what rank 0 signs it with."""


def shared_over(wire: Wire, size: int, willing: bool) -> mmap.mmap | None:
    """`size` zero bytes that all ranks of `wire` share, None where some cannot or are not willing; a collective.

    Rank 0 makes nameless memory and tells where it can be opened; a rank that finds it there, signed by rank 0,
    is on the same machine.
    """
    secret = os.urandom(8).hex().encode()
    descriptor = _make(size, secret) if wire.rank == 0 and willing else None
    try:
        path = "" if descriptor is None else f"/proc/{os.getpid()}/fd/{descriptor}"
        offer = (secret + path.encode()).ljust(OFFER_BYTES, b"\0")
        offers = wire.all_gather(torch.frombuffer(bytearray(offer), dtype=torch.uint8))
        secret, slash, rest = bytes(offers[0].tolist()).rstrip(b"\0").partition(b"/")
        memory = _map(Path((slash + rest).decode()), size, secret) if rest and willing else None
        verdicts = wire.all_gather(torch.tensor([memory is not None], dtype=torch.uint8))
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return memory if bool(verdicts.all()) else None


def _make(size: int, secret: bytes) -> int | None:
    """The descriptor of `size` bytes, zero up to the signature after them; None where there can be none."""
    try:
        descriptor = os.memfd_create("syncbn")
    except (AttributeError, OSError):  # not Linux; or no leave
        return None
    try:
        os.posix_fallocate(descriptor, 0, size + SIGNATURE_BYTES)  # or a bus error, later
        os.pwrite(descriptor, secret + machine(), size)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map(path: Path, size: int, secret: bytes) -> mmap.mmap | None:
    with contextlib.suppress(OSError, ValueError):
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size + SIGNATURE_BYTES)
        if memory[-SIGNATURE_BYTES:].rstrip(b"\0") == secret + machine():
            return memory
    return None
