"""Ranks with unequal numbers of batches, kept in step: one that has run out goes on with empty batches.

Every synchronised layer waits for all ranks of its group, and so does DistributedDataParallel. An empty batch takes
part in all of that by the same code as any other: it adds nothing to the statistics and gives zero gradients. So
nothing has to imitate what the other ranks send, which is what torch's `Join` would ask for.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves, tree_map_only

from syncbn.norm.comm.groups import GroupSpec, resolve

Batch = TypeVar("Batch")

OUT, UNKNOWING, FAILED = 0, -1, -2
"""What a rank without a batch says in a meeting; UNKNOWING: it cannot tell what an empty one looks like."""
READY = 1
"""What a rank with a batch says; more bits may be set beside it."""
_END = object()


def in_lockstep(batches: Iterable[Batch], process_group: GroupSpec = None) -> Iterator[Batch]:
    """`batches`, followed by empty ones until every rank of the group has given all of its own.

        for x, target in syncbn.in_lockstep(loader):
            loss = cross_entropy(model(x), target, reduction="sum") * world_size / global_batch

    The loop's body runs equally often on every rank. In an empty batch every tensor has no samples: model and loss
    must accept that, and the loss must be a sum, because a mean over nothing is NaN. Where no rank's loop ends before
    its iterator does, none waits for another in vain.

    Args:
        batches: tensors, or tuples, lists and dicts of them; the first dimension counts samples.
        process_group: who keeps in step, see `SyncBatchNorm`; without torch.distributed nobody needs to.

    Yields:
        The rank's own batches, then empty ones in their form, or in that of another rank where it had none.

    Raises:
        RuntimeError: another rank's `batches` raised; that rank raises its own error.
        TypeError: a batch that no empty one can be made of.
    """
    group = resolve(process_group)
    if group is None:
        yield from batches
        return
    source, empty = iter(batches), _END
    while True:
        batch = _next(source, group)
        if batch is not _END:
            empty = empty_like(batch)
        states = meet(
            READY if batch is not _END else OUT if empty is not _END else UNKNOWING, group
        )
        if READY not in states:
            return
        empty = shared(empty, states, group)
        yield cast(Batch, empty if batch is _END else batch)


def meet(state: int, group: ProcessGroup) -> list[int]:
    """What every rank of `group` says, in rank order; a collective.

    Raises:
        RuntimeError: some rank says that it failed.
    """
    own = torch.tensor([state], device=_device(group))
    states = own.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(states, own, group=group)
    found = states.tolist()
    if FAILED in found:
        rank = dist.get_process_group_ranks(group)[found.index(FAILED)]
        raise RuntimeError(f"rank {rank} failed on the way to its next batch: its log says why")
    return found


def empty_like(batch: Any) -> Any:
    """`batch` without its samples: every tensor `(N, *)` becomes `(0, *)`; the rest stays as it is.

    Raises:
        TypeError: samples within an object of another kind, where they would stay.
    """
    for leaf in tree_leaves(batch):
        if _hides_samples(leaf):
            raise TypeError(
                f"a batch with a {type(leaf).__name__} is not allowed, because no empty one can be made of it: "
                "tensors, in tuples, lists and dicts"
            )
    return tree_map_only(Tensor, _without_samples, batch)


def shared(empty: Any, states: list[int], group: ProcessGroup) -> Any:
    """`empty`, or where a rank does not know it, that of the first rank with a batch; a collective where one does not.

    Args:
        empty: this rank's empty batch; of any value where this rank said `UNKNOWING`.
        states: of the meeting, some of them ready.
        group: who met.
    """
    if UNKNOWING not in states:
        return empty
    source = next(rank for rank, state in enumerate(states) if state >= READY)
    found = [None, None]
    if dist.get_rank(group) == source:
        devices = {leaf.device.type for leaf in tree_leaves(empty) if isinstance(leaf, Tensor)}
        found = [
            tree_map_only(Tensor, Tensor.cpu, empty),
            "cpu" if len(devices) != 1 else devices.pop(),
        ]
    dist.broadcast_object_list(found, group=group, group_src=source)
    if states[dist.get_rank(group)] != UNKNOWING:
        return empty
    return tree_map_only(Tensor, lambda tensor: tensor.to(found[1]), found[0])


def _next(source: Iterator[Any], group: ProcessGroup) -> Any:
    """The next batch or `_END`; a failure is told to the others before it is raised."""
    try:
        return next(source, _END)
    except Exception:
        with suppress(RuntimeError):
            meet(FAILED, group)
        raise


def _without_samples(tensor: Tensor) -> Tensor:
    """A copy, so that it does not keep the memory of the batch."""
    if tensor.dim() == 0:
        return tensor
    return tensor.detach()[:0].clone().requires_grad_(tensor.requires_grad)


def _hides_samples(leaf: Any) -> bool:
    """Whether something that is no tensor is an array, or an object with tensors among its attributes."""
    if isinstance(leaf, Tensor):
        return False
    inside = tree_leaves(list(getattr(leaf, "__dict__", {}).values()))
    return hasattr(leaf, "__array__") or any(isinstance(value, Tensor) for value in inside)


def _device(group: ProcessGroup) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
