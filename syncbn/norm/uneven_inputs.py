"""`join`: DistributedDataParallel over unequal numbers of batches, for models with synchronised layers.

DistributedDataParallel's own `join` lets a rank that has run out imitate its all-reduces, and knows nothing of the
exchanges inside the model: the others would wait in the first of them. Here that rank runs forward and backward on
an empty batch instead (see `lockstep`), which takes part in everything.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from syncbn.norm.uneven_inputs_lockstep import OUT, READY, UNKNOWING, empty_like, meet, shared

_WITH_GRAD, _WITH_SYNC = 2, 4


@contextmanager
def join(
    model: DistributedDataParallel, step: Callable[[], object] | None = None
) -> Iterator[None]:
    """Train inside with as many batches on each rank as it has; use it in the place of `model.join()`.

        with syncbn.join(model, step):
            for x, target in loader:
                loss(model(x), target).backward()
                step()  # optimizer.step(), optimizer.zero_grad()

    Every call of `model` begins a step, with at most one backward pass through all of its outputs. A rank that has
    run out repeats each step of the others with an empty batch, in the form, the autocast state and the `no_sync`
    state of theirs, and in training mode: evaluate outside. Gradients are divided by the number of all ranks, as in
    `model.join()` by default. Where some rank ran out, parameters and buffers are at last made equal to those of a
    rank that did not. For loops of another shape see `in_lockstep`.

    Args:
        model: the wrapped model; it must accept an empty batch.
        step: what a rank that has run out does once it has the averaged gradients; call the same in the loop.
            With it, the state of the optimizer stays equal on all ranks; without it, their gradients are dropped.

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
    steps.follow(step or model.zero_grad)


def refuse_ddp_join(name: str) -> None:
    """Raise where DistributedDataParallel's own `join` is in use: it would leave this layer waiting for ever.

    Raises:
        RuntimeError: in the forward pass of such a model.
    """
    model = DistributedDataParallel._active_ddp_module
    if model is None or not model._join_config.enable:
        return
    if (
        not model._join_config.throw_on_early_termination
    ):  # else it ends when the first rank runs out
        raise RuntimeError(
            f"SyncBatchNorm {name!r} inside DistributedDataParallel.join(), which cannot stand in for a rank that "
            "has run out of batches there: use `with syncbn.join(model):` instead"
        )


class _Steps:
    """The steps of one `join`, on one rank."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        assert model.process_group is not None
        self._group: ProcessGroup = model.process_group
        self._device_type = model.device_type
        self._empty: Any = None
        self._autocast: AbstractContextManager[Any] = nullcontext()
        self._last: list[int] = []

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: tell the other ranks what kind of step this one begins, and note how to repeat it."""
        del model
        self._empty = empty_like((args, kwargs))
        self._autocast = torch.autocast(
            self._device_type,
            dtype=torch.get_autocast_dtype(self._device_type),
            enabled=torch.is_autocast_enabled(self._device_type),
        )
        sync = _WITH_SYNC if self._model.require_backward_grad_sync else 0
        self._last = meet(
            READY | (_WITH_GRAD if torch.is_grad_enabled() else 0) | sync, self._group
        )
        shared(self._empty, self._last, self._group)

    def follow(self, step: Callable[[], object]) -> None:
        """Repeat the others' steps until all ranks have run out, then make the model the same everywhere."""
        while max(states := meet(UNKNOWING if self._empty is None else OUT, self._group)) >= READY:
            self._last = states
            self._empty = shared(self._empty, states, self._group)
            kinds = [state for state in states if state >= READY]
            self._repeat(kinds[0], step)
        if any(state < READY for state in self._last):
            self._settle(next(r for r, state in enumerate(self._last) if state >= READY))

    def _repeat(self, kind: int, step: Callable[[], object]) -> None:
        args, kwargs = self._empty
        sync = self._model.no_sync() if not kind & _WITH_SYNC else nullcontext()
        with sync, torch.set_grad_enabled(bool(kind & _WITH_GRAD)):
            with self._autocast:
                output = self._model(*args, **kwargs)
            if not kind & _WITH_GRAD:
                return
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            torch.autograd.backward([leaf.sum() for leaf in leaves if leaf.requires_grad])
        if kind & _WITH_SYNC:
            step()

    def _settle(self, source: int) -> None:
        with torch.no_grad():
            for tensor in (*self._model.module.parameters(), *self._model.module.buffers()):
                dist.broadcast(tensor, group_src=source, group=self._group)
