"""Who is synchronised with whom: a group by name, by size, or as a ProcessGroup.

A layer keeps the *description* ("world", "node", an int, None) and resolves it at its first exchange, so that
models can be built, pickled, copied and loaded before, and without, any process group.
"""

import os
import weakref
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

GroupSpec = Literal["world", "node"] | int | ProcessGroup | None
"""None and "world": all ranks. "node": the ranks of one machine. k: consecutive ranks, k at a time; 1: each alone."""


_made: weakref.WeakKeyDictionary[
    ProcessGroup, weakref.WeakValueDictionary[str | int, ProcessGroup]
] = weakref.WeakKeyDictionary()
"""Groups made so far, by the default group they are parts of. torch.distributed owns them, until it is shut down."""


def check_spec(spec: GroupSpec) -> None:
    """Raise for anything that can never describe a group.

    Raises:
        TypeError: neither None, str, int nor ProcessGroup.
        ValueError: a string other than "world" and "node", or an int below 1.
    """
    if spec is None or isinstance(spec, ProcessGroup) or _lacks_this_rank(spec):
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
    """The group that `spec` means for this rank now; None for this rank alone, whom it takes no group to synchronise.

    That is so where torch.distributed is not initialised, and for a size of 1. The first call for a name or a larger
    size makes the groups, and is collective over all ranks.

    Raises:
        ValueError: a size that does not divide the world size, or a group that does not contain this rank.
        RuntimeError: a ProcessGroup that was destroyed.
    """
    if _lacks_this_rank(spec):
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise ValueError(
            f"process_group does not contain rank {rank}, which cannot train a layer of that group"
        )
    if not (dist.is_available() and dist.is_initialized()) or spec == 1:
        return None
    if isinstance(spec, ProcessGroup):
        return _alive(spec)
    world = dist.group.WORLD
    assert world is not None
    if spec is None or spec == "world":
        return world
    groups = _made.setdefault(world, weakref.WeakValueDictionary())
    group = groups.get(spec)
    if group is None:
        group = groups[spec] = _make(spec)
    return group


def known(spec: GroupSpec) -> ProcessGroup | None:
    """The group that `spec` means, where that is known without asking other ranks; never a collective."""
    if _lacks_this_rank(spec):
        return None
    if isinstance(spec, str | int) and spec != "world":
        world = dist.group.WORLD if dist.is_initialized() else None
        return None if world is None else _made.get(world, {}).get(spec)
    return resolve(spec)


def _lacks_this_rank(spec: GroupSpec) -> bool:
    """Whether `spec` is what `torch.distributed.new_group` gives to a rank outside the group."""
    return dist.is_available() and spec == dist.GroupMember.NON_GROUP_MEMBER


def _alive(group: ProcessGroup) -> ProcessGroup:
    try:
        dist.get_process_group_ranks(group)
    except KeyError as error:
        raise RuntimeError(
            "process_group was destroyed: give a live group, or name it ('world', 'node', a size)"
        ) from error
    return group


def _make(spec: str | int) -> ProcessGroup:
    """Make every group of the partition that `spec` describes; return the one with this rank in it."""
    own, timeout = None, _timeout_of_world()
    for ranks in _partition(spec):
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    assert isinstance(own, ProcessGroup)
    return own


def _timeout_of_world() -> timedelta:
    """The time limit that the user gave: groups made here wait no longer than theirs."""
    world = dist.group.WORLD
    assert world is not None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return world._get_backend(torch.device(device)).options._timeout


def _partition(spec: str | int) -> list[list[int]]:
    world_size = dist.get_world_size()
    if spec == "node":
        return _nodes()
    assert isinstance(spec, int)
    if world_size % spec:
        raise ValueError(f"process_group={spec} does not divide the world size {world_size}")
    return [list(range(first, first + spec)) for first in range(0, world_size, spec)]


def _nodes() -> list[list[int]]:
    """Ranks by machine; a machine is known by the first of its consecutive ranks, `RANK - LOCAL_RANK`."""
    first = dist.get_rank() - int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([first], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    firsts = [int(t) for t in everyone]
    return [[r for r, f in enumerate(firsts) if f == node] for node in sorted(set(firsts))]
