"""The first exchange of a group: its ranks wait for each other, and choose a transport.

Choosing takes collectives, and those of another kind on the other ranks (a barrier, a reduction of gradients) would
be mistaken for them. So ranks first wait for each other in the group's key-value store, where their watchdogs look
why one does not come. Where a rank that is missing answers nothing, they go on to the collective after a few
seconds: it may have exited, on another machine, and the connections of the group tell.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress

import torch.distributed as dist

from syncbn.norm.comm.fingerprint import RankLost, RanksDisagree
from syncbn.norm.comm.processes import Process
from syncbn.norm.comm.transports import Transport
from syncbn.norm.comm.transports.process_group import Group
from syncbn.norm.comm.transports.shared_memory import SharedMemory
from syncbn.norm.comm.transports.sockets import MESH_RANKS, Sockets
from syncbn.norm.comm.watchdog import Wait

CHOICES = ("auto", "shared", "sockets", "gloo")
"""What `SYNCBN_EXCHANGE` may be set to: the best there is, or one of the transports."""
SETTLE_S = 5.0
"""How long to wait for a sign of life of the ranks that have not come."""
_PROCESS_BYTES = 128
_HERE, _FAILED = "syncbn/here/{}", "syncbn/failed"


def connect(group: Group, header: bytes, number: int) -> Transport:
    """The transport of `group`, chosen with all its ranks; collective, in the exchange of `header`.

    Raises:
        RanksDisagree, RankLost: see `watchdog`; or a rank that waited here has given up.
        ValueError: `SYNCBN_EXCHANGE` is not one of `CHOICES`.
        RuntimeError: it is a transport that some rank cannot use.
    """
    choice = os.environ.get("SYNCBN_EXCHANGE", "auto")
    if choice not in CHOICES:
        raise ValueError(f"SYNCBN_EXCHANGE={choice!r} is not allowed: one of {', '.join(CHOICES)}")
    group.turn = header, number
    here = _HERE.format(group.rank)
    with suppress(dist.DistError):  # a store that went away tells nothing
        group.store.set(here, "")
        _wait_for_all(group)
    group.processes = _processes(group)
    transport = _choose(group, choice)
    with suppress(dist.DistError):
        group.store.delete_key(here)
    return transport


def _wait_for_all(group: Group) -> None:
    _hear_of_failure(group)
    missing = _missing(group, range(group.world_size))
    if not missing:
        return
    with Wait(group) as wait:
        while missing:
            if wait.waited_s > SETTLE_S and not any(wait.answers(rank) for rank in wait.missing):
                return  # none of them has given a sign of life
            _hear_of_failure(group)
            try:
                wait.look(missing)
            except RuntimeError as error:
                kind = "lost" if isinstance(error, RankLost) else "disagree"
                group.store.set(_FAILED, f"{kind} {error}")
                raise
            time.sleep(min(0.05, max(0.001, wait.waited_s / 10)))
            missing = _missing(group, missing)


def _hear_of_failure(group: Group) -> None:
    """Raise what made another rank give up the group."""
    if group.store.check([_FAILED]):
        kind, _, message = group.store.get(_FAILED).decode().partition(" ")
        raise RankLost(message) if kind == "lost" else RanksDisagree(message)


def _missing(group: Group, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if not group.store.check([_HERE.format(rank)])]


def _processes(group: Group) -> list[Process]:
    """The processes of all ranks."""
    pid, started, machine = Process.own()
    text = f"{pid} {started} {machine}".encode().ljust(_PROCESS_BYTES, b"\0")
    told = [row.rstrip(b"\0").decode().split(" ", 2) for row in group.all_tell(text)]
    return [Process(int(pid), int(started), machine) for pid, started, machine in told]


def _choose(group: Group, choice: str) -> Transport:
    """Shared memory where all ranks can map it, else sockets, else the group itself; collective."""
    # Every rank takes part, also one that wants neither: ranks that choose differently must agree too.
    memory = SharedMemory.over(group, willing=choice in ("auto", "shared"))
    if memory is not None:
        return memory
    if choice == "shared":
        raise RuntimeError(
            "SYNCBN_EXCHANGE=shared, but the ranks of this group cannot share memory"
        )
    sockets = Sockets.over(group, willing=choice in ("auto", "sockets"))
    if sockets is None and choice == "sockets":
        raise RuntimeError(
            f"SYNCBN_EXCHANGE=sockets, but the ranks of this group cannot connect, or are more than {MESH_RANKS}"
        )
    return sockets or group
