"""Which ranks are synchronised with each other: a group by name, by size, or as a ProcessGroup.

A layer keeps the *description* ("world", "node", an int, None) and resolves it at its first exchange, so that
models can be built, pickled, copied and loaded before, and without, any process group.
"""

import functools
import os
import weakref
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from syncbn.norm.comm.fingerprint import text_of
from syncbn.norm.comm.processes import Process, host

GroupSpec = Literal["world", "node"] | int | ProcessGroup | None
"""None and "world": all ranks. "node": the ranks of one host. k: consecutive ranks, k at a time; 1: each alone."""

_made: weakref.WeakKeyDictionary[
    ProcessGroup, weakref.WeakValueDictionary[str | int, ProcessGroup]
] = weakref.WeakKeyDictionary()
"""Groups made so far, by the default group they are parts of. torch.distributed owns them, until it is shut down."""


_parents: weakref.ref[ProcessGroup] | None = None
"""The default group of the process that this one was forked from."""


def in_parents_group() -> bool:
    """Whether the default group is that of the process that this one was forked from, and this one no rank of it."""
    return _parents is not None and _parents() is dist.group.WORLD


def _forked() -> None:
    global _parents
    world = dist.group.WORLD if dist.is_available() else None
    _parents = None if world is None else weakref.ref(world)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Members:
    """The ranks of one process group, seen from this one.

    The group is held weakly: a group that outlives `destroy_process_group` takes the process down at its exit.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.name = str(group.group_name)
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_process_group_ranks(group)
        """Global ranks."""
        self.processes: list[Process] = []
        """Every rank's, once they have told each other."""
        self.turn = b"", 0
        """Header and sequence number of the exchange that is under way."""

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def process_group(self) -> ProcessGroup:
        """The group itself."""
        group = self._group()
        assert group is not None, "the group was destroyed"
        return group

    @property
    def store(self) -> Store:
        """The group's key-value store."""
        return dist.distributed_c10d._get_process_group_store(self.process_group)

    @functools.cached_property
    def timeout_s(self) -> float:
        """The longest wait that the group allows on the CPU, in seconds."""
        backend = self.process_group._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds()

    def here(self) -> str:
        """This rank, and what it is doing, in words."""
        return f"rank {self.ranks[self.rank]} {text_of(*self.turn)}"


def check_spec(spec: GroupSpec) -> None:
    """Raise for anything that can never describe a group.

    What `torch.distributed.new_group` returns on ranks outside the group is allowed: such a rank may hold the
    layer and evaluate with it.

    Raises:
        TypeError: neither None, str, int nor ProcessGroup.
        ValueError: a string other than "world" and "node", or an int below 1.
    """
    if spec is None or isinstance(spec, ProcessGroup) or _excludes_this_rank(spec):
        return
    if isinstance(spec, bool) or not isinstance(spec, str | int):
        raise TypeError(
            f"process_group={spec!r} is not allowed: None, 'world', 'node', a group size or a ProcessGroup"
        )
    if isinstance(spec, str) and spec not in ("world", "node"):
        raise ValueError(f"process_group={spec!r} is not allowed: 'world' or 'node'")
    if isinstance(spec, int) and spec < 1:
        raise ValueError(f"process_group={spec!r} is not allowed: a group size is >= 1")


def resolve(spec: GroupSpec) -> ProcessGroup | None:
    """The group that `spec` means for this rank now; None means that no communication is needed.

    That is so where torch.distributed is not initialised, and for a size of 1. The first call for a name or a larger
    size makes the groups, and is collective over all ranks.

    Raises:
        ValueError: a size that does not divide the world size, or a group that does not contain this rank.
        RuntimeError: a ProcessGroup that was destroyed.
    """
    if not dist.is_available() or spec == 1:
        return None
    world = dist.group.WORLD  # None before it is initialised
    if isinstance(spec, ProcessGroup):
        return _alive(spec)
    if spec is None or world is None:
        return world
    if _excludes_this_rank(spec):
        raise ValueError(
            f"process_group does not contain rank {dist.get_rank()}, which cannot train a layer of that group"
        )
    if spec == "world":
        return world
    groups = _made.setdefault(world, weakref.WeakValueDictionary())
    group = groups.get(spec)
    if group is None:
        group = groups[spec] = _make(spec, world)
    return group


def _excludes_this_rank(spec: object) -> bool:
    """Whether `spec` is what torch gives for a group to ranks outside it: an int in some versions."""
    outside = dist.GroupMember.NON_GROUP_MEMBER
    return type(spec) is type(outside) and spec == outside


def _alive(group: ProcessGroup) -> ProcessGroup:
    try:
        dist.get_process_group_ranks(group)
    except KeyError as error:
        raise RuntimeError(
            "process_group was destroyed: give a live group, or name it ('world', 'node', a size)"
        ) from error
    return group


def _make(spec: str | int, world: ProcessGroup) -> ProcessGroup:
    """Make every group of the partition that `spec` describes; return the one with this rank in it."""
    if spec == "node":
        partition = _nodes()
    else:
        assert isinstance(spec, int)
        if world.size() % spec:
            raise ValueError(f"process_group={spec} does not divide the world size {world.size()}")
        partition = [list(range(at, at + spec)) for at in range(0, world.size(), spec)]
    own = None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # the one that the user gave: groups made here wait no longer than theirs
    timeout = world._get_backend(torch.device(device)).options._timeout
    for ranks in partition:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    assert isinstance(own, ProcessGroup)
    return own


def _nodes() -> list[list[int]]:
    """Ranks by host, as the ranks tell it: how they were started does not matter."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host())
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(hosts):
        nodes.setdefault(name, []).append(rank)
    return list(nodes.values())
