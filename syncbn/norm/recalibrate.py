"""`recalibrate`: population statistics after training, over all ranks ("precise BN").

Running averages lag behind a model that still learns. Here the final model sees the data once more and every batch
norm's buffers become the exact moments of what entered it (Algorithm 2 of Ioffe & Szegedy 2015). Batches and ranks are
merged by their counts, in float64.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.norm.backends import selected
from syncbn.norm.backends.base import NormArgs
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of
from syncbn.norm.comm.groups import GroupSpec, resolve
from syncbn.norm.module import SyncBatchNorm
from syncbn.norm.moments import Moments, merge, pack, unpack
from syncbn.norm.uneven_inputs import in_lockstep
from syncbn.norm.validation import checked_group, fitted


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any], process_group: GroupSpec = None) -> None:
    """Set the running statistics of every batch norm in `model` to those of all data that `loader` yields.

    One pass in training mode, so that each layer sees inputs normalised as in training; modes are restored,
    parameters and other layers are left alone. With torch.distributed, every rank of the group calls it with its
    share of the data: any number of batches, also none. Where layers are synchronised, a rank that has run out of
    batches goes on with empty ones (see `in_lockstep`), which `model` must then accept.

    Args:
        model: called with each batch.
        loader: batches; of a tuple or list, the first element is the input.
        process_group: the ranks whose data make the population, see `SyncBatchNorm`; it contains the layers' groups.
            With 1 a rank communicates with no other, and may call it alone.

    Raises:
        ValueError: no batch norm with running statistics in `model`, one that no data reached, or one whose group
            reaches beyond `process_group`; nothing is set, on any rank.
        RuntimeError: another rank's `loader` raised, where layers are synchronised.
    """
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    }
    if not layers:
        raise ValueError("recalibrate: the model has no batch norm that tracks running statistics")
    group = resolve(checked_group(process_group))
    inputs = (batch[0] if isinstance(batch, tuple | list) else batch for batch in loader)
    if _are_synchronised(model, group):
        inputs = in_lockstep(inputs, group)
    own = _observed(model, inputs, list(layers.values()))
    populations = {n: _over_ranks(own[layer], n, group) for n, layer in layers.items()}
    for name, population in populations.items():
        if population.count == 0:
            raise ValueError(f"recalibrate: no data reached layer {name!r} on any rank")
    for name, population in populations.items():
        _set(layers[name], population)


def _are_synchronised(model: nn.Module, group: ProcessGroup | None) -> bool:
    """Whether layers of `model` wait for other ranks, all of which must then be in `group`."""
    widest, own = 1, _ranks(group)
    for name, layer in model.named_modules():
        if isinstance(layer, SyncBatchNorm):
            ranks = _ranks(resolve(layer.process_group))
            if not ranks <= own:
                raise ValueError(
                    f"recalibrate: process_group has ranks {sorted(own)}, "
                    f"but layer {name!r} is synchronised over {sorted(ranks)}: give a group that contains them"
                )
            widest = max(widest, len(ranks))
    return widest > 1


def _ranks(group: ProcessGroup | None) -> set[int]:
    """The ranks of `group`; this rank alone where it is None."""
    if group is not None:
        return set(dist.get_process_group_ranks(group))
    return {dist.get_rank() if dist.is_initialized() else 0}


def _observed(
    model: nn.Module, inputs: Iterable[Any], layers: list[_BatchNorm]
) -> dict[nn.Module, Moments]:
    """The moments of what enters each of `layers` on this rank, in float64; the model is left as it was."""
    own: dict[nn.Module, Moments] = {layer: _no_moments(layer) for layer in layers}

    def collect(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("input", "mask"), args, strict=False)) | kwargs
        x = named.get("input", next(iter(named.values())))
        mask = named.get("mask") if isinstance(layer, SyncBatchNorm) else None
        args = NormArgs(x, mask=None if mask is None else fitted(mask, x))
        packed = selected(x.device.type).for_pass(args).local_stats(args)
        own[layer] = merge(*unpack(torch.stack([pack(own[layer]), packed.to(torch.float64)])))

    hooks = [layer.register_forward_pre_hook(collect, with_kwargs=True) for layer in layers]
    try:
        with _training(model):
            for batch in inputs:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return own


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Every module in training mode; then modes and buffers as before."""
    before = [buffer.clone() for buffer in model.buffers()]
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def _no_moments(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None
    zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
    return Moments(zeros.new_zeros(()), zeros, zeros)


def _over_ranks(own: Moments, name: str, group: ProcessGroup | None) -> Moments:
    if group is None:
        return own
    what = Fingerprint(f"recalibrate {name}", own.mean.numel(), torch.float64, needs_grad=False)
    return merge(*unpack(exchange_of(group).gather(pack(own), FORWARD, what)))


def _set(layer: _BatchNorm, population: Moments) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(population.mean)
    layer.running_var.copy_(population.M2 / (population.count - 1).clamp(min=1))
