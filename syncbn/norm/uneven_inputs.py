"""Training with unequal numbers of batches per rank: `join` for DistributedDataParallel, `in_lockstep` for any loop.

Every synchronised layer waits for all ranks of its group, and so does DistributedDataParallel. A rank that has run out
of batches goes on with empty ones: an empty batch takes part in every collective by the same code as any other, adds
nothing to the statistics and gives zero gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from syncbn.norm.comm.groups import GroupSpec, resolve
from syncbn.norm.validation import checked_group

Batch = TypeVar("Batch")

_FAILED, _NO_EXAMPLE, _NO_BATCH, _HAS_BATCH = -2, -1, 0, 1
"""A rank's state in a step; _NO_EXAMPLE: it has no batch, and never had one to make an empty one of."""
_WITH_GRAD, _WITH_SYNC = 2, 4
"""Bits beside _HAS_BATCH: whether gradients are enabled, and whether DistributedDataParallel averages them."""
_END = object()


def in_lockstep(batches: Iterable[Batch], process_group: GroupSpec = None) -> Iterator[Batch]:
    """`batches`, followed by empty ones until every rank of the group has given all of its own.

        for x, target in syncbn.in_lockstep(loader):
            loss = cross_entropy(model(x), target, reduction="sum") * world_size / global_batch

    The loop's body runs equally often on every rank. In an empty batch every tensor has no samples: model and loss
    must accept that, and the loss must be a sum, because a mean over nothing is NaN. No rank may leave the loop early.

    Args:
        batches: tensors, or tuples, lists and dicts of them; the first dimension counts samples.
        process_group: the ranks that keep in step, see `SyncBatchNorm`. Without torch.distributed, `batches` alone.

    Yields:
        The rank's own batches, then empty ones of their structure, or of another rank's where it had none.

    Raises:
        RuntimeError: another rank's `batches` raised; that rank raises its own error.
        TypeError: a batch that no empty one can be made of.
    """
    group = resolve(checked_group(process_group))
    if group is None:
        yield from batches
        return
    ranks, source = _Ranks(group), iter(batches)
    while True:
        batch = ranks.next_of(source)
        if batch is not _END:
            ranks.empty = _empty_like(batch)
        if not ranks.begin_step(_NO_BATCH if batch is _END else _HAS_BATCH):
            return
        yield cast(Batch, ranks.empty if batch is _END else batch)


@contextmanager
def join(
    model: DistributedDataParallel, step: Callable[[], object] | None = None
) -> Iterator[None]:
    """Train inside with as many batches on each rank as it has; use it in the place of `model.join()`.

        with syncbn.join(model, step):
            for x, target in loader:
                loss(model(x), target).backward()
                step()  # optimizer.step(), optimizer.zero_grad()

    DistributedDataParallel's own `join` stands in for its all-reduces only, not for the collectives inside the model.
    Here every call of `model` begins a step, with at most one backward pass through all of its outputs. A rank that
    has run out of batches repeats each step of the others with an empty batch, in the structure, the autocast state
    and the `no_sync` state of theirs, and in training mode: evaluate outside. Gradients are divided by the number of
    all ranks, as in `model.join()` by default. Where some rank ran out, parameters and buffers are at the end made
    equal to those of a rank that did not. For loops of another shape see `in_lockstep`.

    Args:
        model: the wrapped model; it must accept an empty batch.
        step: what a rank that has run out of batches does once it has the averaged gradients; call the same in the
            loop. With it, the state of the optimizer stays equal on all ranks; without it, their gradients are dropped.

    Raises:
        TypeError: `model` is not wrapped, or is called with what no empty batch can be made of.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model={type(model).__name__} is not allowed: a DistributedDataParallel")
    steps = _Steps(model)
    hook = model.register_forward_pre_hook(steps.begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
    steps.repeat_others(step or model.zero_grad)


def refuse_ddp_join(name: str) -> None:
    """Raise RuntimeError within DistributedDataParallel's own `join`, where a rank would wait for layer `name`."""
    model = DistributedDataParallel._active_ddp_module
    if model is None or not model._join_config.enable:
        return
    if model._join_config.throw_on_early_termination:  # all ranks end when the first runs out
        return
    raise RuntimeError(
        f"SyncBatchNorm {name!r} inside DistributedDataParallel.join(), which cannot stand in for a rank that "
        "has run out of batches there: use `with syncbn.join(model):` instead"
    )


class _Ranks:
    """The ranks of a group, step by step: which of them have a batch, and what an empty batch looks like.

    Attributes:
        states: of every rank in the latest step in which some rank had a batch.
        empty: an empty batch; `_END` until this rank knows one.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        self.states: list[int] = []
        self.empty: Any = _END

    def begin_step(self, state: int) -> bool:
        """Tell the other ranks this rank's state; a collective. Whether some rank has a batch."""
        if state == _NO_BATCH and self.empty is _END:
            state = _NO_EXAMPLE
        states = self._gather(state)
        if max(states) < _HAS_BATCH:
            return False
        self.states = states
        if _NO_EXAMPLE in states:
            self._share_empty(state)
        return True

    def next_of(self, source: Iterator[Any]) -> Any:
        """The next batch or `_END`; a failure is told to the other ranks before it is raised."""
        try:
            return next(source, _END)
        except Exception:
            with suppress(RuntimeError):
                self._gather(_FAILED)
            raise

    def with_batch(self) -> list[int]:
        """The ranks, within the group, that had a batch in the latest step."""
        return [rank for rank, state in enumerate(self.states) if state >= _HAS_BATCH]

    def _gather(self, state: int) -> list[int]:
        own = torch.tensor([state], device=self._device)
        gathered = own.new_empty(dist.get_world_size(self._group))
        dist.all_gather_into_tensor(gathered, own, group=self._group)
        states = gathered.tolist()
        if _FAILED in states:
            rank = dist.get_process_group_ranks(self._group)[states.index(_FAILED)]
            raise RuntimeError(f"rank {rank} failed to produce its next batch: its log says why")
        return states

    def _share_empty(self, state: int) -> None:
        """Give ranks without an example the empty batch of the first rank with a batch; a collective."""
        source = self.with_batch()[0]
        shared = [None, None]
        if dist.get_rank(self._group) == source:
            tensors = [leaf for leaf in tree_leaves(self.empty) if isinstance(leaf, Tensor)]
            devices = {tensor.device.type for tensor in tensors}
            device = devices.pop() if len(devices) == 1 else "cpu"
            shared = [tree_map_only(Tensor, Tensor.cpu, self.empty), device]
        dist.broadcast_object_list(shared, group=self._group, group_src=source)
        if state == _NO_EXAMPLE:
            self.empty = tree_map_only(Tensor, lambda tensor: tensor.to(shared[1]), shared[0])


class _Steps:
    """The steps of one `join`, on one rank."""

    def __init__(self, model: DistributedDataParallel) -> None:
        assert model.process_group is not None
        self._model, self._ranks = model, _Ranks(model.process_group)
        self._autocast: AbstractContextManager[Any] = nullcontext()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: tell the other ranks what kind of step this one begins, and note how to repeat it."""
        del model
        device_type = self._model.device_type
        self._autocast = torch.autocast(
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )
        self._ranks.empty = _empty_like((args, kwargs))
        grad = _WITH_GRAD if torch.is_grad_enabled() else 0
        sync = _WITH_SYNC if self._model.require_backward_grad_sync else 0
        self._ranks.begin_step(_HAS_BATCH | grad | sync)

    def repeat_others(self, step: Callable[[], object]) -> None:
        """Repeat the others' steps until all ranks have run out, then make the model the same everywhere."""
        while self._ranks.begin_step(_NO_BATCH):
            self._repeat(max(self._ranks.states), step)
        with_batch = self._ranks.with_batch()
        if len(with_batch) == len(self._ranks.states):
            return
        with torch.no_grad():
            for tensor in (*self._model.module.parameters(), *self._model.module.buffers()):
                dist.broadcast(tensor, group_src=with_batch[0], group=self._model.process_group)

    def _repeat(self, state: int, step: Callable[[], object]) -> None:
        args, kwargs = self._ranks.empty
        sync = self._model.no_sync() if not state & _WITH_SYNC else nullcontext()
        with sync, torch.set_grad_enabled(bool(state & _WITH_GRAD)):
            with self._autocast:
                output = self._model(*args, **kwargs)
            if not state & _WITH_GRAD:
                return
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            torch.autograd.backward([leaf.sum() for leaf in leaves if leaf.requires_grad])
        if state & _WITH_SYNC:
            step()


def _empty_like(batch: Any) -> Any:
    """`batch` without its samples: every tensor `(N, *)` becomes `(0, *)`; the rest stays as it is.

    Raises:
        TypeError: an array, or an object with tensors among its attributes, where samples would stay.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            continue
        inside = tree_leaves(list(getattr(leaf, "__dict__", {}).values()))
        if hasattr(leaf, "__array__") or any(isinstance(value, Tensor) for value in inside):
            raise TypeError(
                f"a batch with a {type(leaf).__name__} is not allowed, because no empty one can be made of it: "
                "tensors, in tuples, lists and dicts"
            )
    return tree_map_only(Tensor, _without_samples, batch)


def _without_samples(tensor: Tensor) -> Tensor:
    """A copy, so that it does not keep the memory of the batch."""
    if tensor.dim() == 0:
        return tensor
    return tensor.detach()[:0].clone().requires_grad_(tensor.requires_grad)
