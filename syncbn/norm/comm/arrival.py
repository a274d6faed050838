"""The wait before a group's first exchange, when its ranks share no memory yet.

Finding out whether they can share any takes a collective, and a rank that runs in eval mode never joins one: it would
be missed at the group's time limit only. So ranks meet in the group's key-value store first, where a rank in eval
mode leaves word too. After a few seconds without such word they go on to the collective, which notices at once
when a rank dies.
"""

import json
import os
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from syncbn.norm.comm.fingerprint import FORWARD, Header, RanksDisagree, passed_by
from syncbn.norm.comm.patrol import Absent, Patrol, linger
from syncbn.norm.comm.processes import Process, machine
from syncbn.norm.comm.transports.process_group import Wire

SETTLE_S = 3.0
"""How long to look for word from the ranks that have not come."""
_HERE, _WAITING, _FAILED = "syncbn/here/{}", "syncbn/waiting", "syncbn/failed"
_PASSED = "syncbn/passed/{}/{}/{}"


class Arrival:
    """What this rank tells, and learns from, the others of its group until its first exchange.

    Args:
        wire: to the group, which all ranks made, but whose collectives need not have been used.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._passed: set[tuple[str, str]] = set()
        """Passes in eval mode, "forward" or "backward" and the layer."""
        self._lingered = False

    def wait(self, header: bytes, call: int) -> None:
        """Wait until every rank has come to an exchange, or is best waited for in a collective.

        Raises:
            RanksDisagree, RankLost: see `patrol`; or a rank that waited here has given up.
        """
        store, doing = self._store, Header.unpack(header)
        here = f"rank {self._wire.ranks[self._wire.rank]} {doing.place(call)}"
        with suppress(dist.DistError):  # a store that went away tells nothing
            store.set(_HERE.format(self._wire.rank), "")
            missing = self._missing(store, list(range(self._wire.world_size)))
            if missing:
                store.set(_WAITING, self._word(doing, here))
                self._wait(store, Patrol(here, self._wire.timeout_s), doing.layer, missing)

    def leave(self) -> None:
        """Take back what was written: all ranks have come, or none will."""
        store, rank = self._store, self._wire.rank
        passed = [_PASSED.format(rank, *place) for place in self._passed]
        with suppress(dist.DistError):
            for key in (_HERE.format(rank), _WAITING, *passed):
                store.delete_key(key)

    def pass_by(self, layer: str, backward: bool) -> None:
        """Leave word that this rank goes through `layer` in eval mode, the first time it does.

        Raises:
            RanksDisagree: in the backward pass, where another rank waits for this one in the forward pass of a
                layer that this one has gone through in eval mode and that one has not.
        """
        place = ("backward" if backward else "forward", layer)
        if place in self._passed:
            return
        self._passed.add(place)
        with suppress(dist.DistError):
            self._store.set(_PASSED.format(self._wire.rank, *place), _process_word())
            if backward and not self._lingered:
                self._lingered = True
                linger(lambda: self._unknown(layer))
            if backward and self._store.check([_WAITING]):
                self._refuse(layer, json.loads(self._store.get(_WAITING)))

    @property
    def _store(self) -> Store:
        return dist.distributed_c10d._get_process_group_store(self._wire.group)

    def _missing(self, store: Store, ranks: list[int]) -> list[int]:
        return [rank for rank in ranks if not store.check([_HERE.format(rank)])]

    def _wait(self, store: Store, patrol: Patrol, layer: str, missing: list[int]) -> None:
        while missing:
            if store.check([_FAILED]):
                raise RanksDisagree(store.get(_FAILED).decode())
            absent = [self._absent(store, rank, layer) for rank in missing]
            if patrol.waited_s > SETTLE_S and not any(one.process for one in absent):
                return
            try:
                patrol.look(absent)
            except RuntimeError as error:
                store.set(_FAILED, str(error))
                raise
            time.sleep(min(0.05, max(0.001, patrol.waited_s / 10)))
            missing = self._missing(store, missing)

    def _absent(self, store: Store, rank: int, layer: str) -> Absent:
        """What `rank` has left word of, as far as it has to do with `layer`."""
        for name in ("backward", "forward"):
            key = _PASSED.format(rank, name, layer)
            if (name, layer) not in self._passed and store.check([key]):
                return Absent(self._wire.ranks[rank], _process(store.get(key)), name)
        return Absent(self._wire.ranks[rank], None)

    def _word(self, doing: Header, here: str) -> str:
        """What a rank that passes by should know of this one, which waits."""
        passed = ("forward", doing.layer) in self._passed
        counts = doing.kind == FORWARD and not passed
        return json.dumps({"here": here, "layer": doing.layer if counts else None})

    def _unknown(self, layer: str) -> bool:
        """Whether some rank neither waits in a first exchange nor has left word of passing `layer`."""
        others = [rank for rank in range(self._wire.world_size) if rank != self._wire.rank]
        keys = [
            _PASSED.format(rank, "forward", layer) for rank in self._missing(self._store, others)
        ]
        return not all(self._store.check([key]) for key in keys)

    def _refuse(self, layer: str, waiting: dict[str, Any]) -> None:
        """Raise where a rank waits for what this rank has gone through in eval mode."""
        if ("forward", waiting["layer"]) in self._passed:
            own = self._wire.ranks[self._wire.rank]
            error = passed_by(own, layer, waiting["here"])
            self._store.set(_FAILED, str(error))
            raise error


def _process_word() -> str:
    return json.dumps([machine().decode(), os.getpid(), Process.own().started])


def _process(word: bytes) -> Process | None:
    """The process that wrote `word`; None where its id means nothing here."""
    where, pid, started = json.loads(word)
    return Process(pid, started) if where == machine().decode() else None
