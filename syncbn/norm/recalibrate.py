"""Population statistics after training, over all ranks: Algorithm 2 of Ioffe & Szegedy (2015), "precise BN".

Running averages lag behind a model that still learns. Here the final model sees the data once more and every
batch norm's buffers become the exact moments of what entered it: batches are merged by count, ranks too.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.norm import kernels
from syncbn.norm.exchange import FORWARD, exchange_of
from syncbn.norm.moments import Moments, merge


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Set the running statistics of every batch norm in `model` to those of all data that `loader` yields.

    One pass in training mode, so that each layer sees inputs normalised as in training; modes are restored,
    parameters and other layers are left alone. With torch.distributed, every rank calls it with its share of
    the data, the same number of batches; a share may hold fewer samples than another.

    Args:
        model: called with each batch.
        loader: batches; of a tuple or list, the first element is the input.

    Raises:
        ValueError: no batch norm with running statistics in `model`, or one that no data reached; nothing is set.
    """
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    }
    if not layers:
        raise ValueError("recalibrate: the model has no batch norm that tracks running statistics")
    before = [buffer.clone() for buffer in model.buffers()]
    own: dict[nn.Module, Moments] = {}

    def collect(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        new = kernels.pick(inputs[0]).moments(inputs[0])
        own[layer] = _union([own[layer], new]) if layer in own else new

    hooks = [layer.register_forward_pre_hook(collect) for layer in layers.values()]
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = True
        for batch in loader:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    populations = {n: _over_ranks(own.get(m) or _nothing(m), n) for n, m in layers.items()}
    for name, population in populations.items():
        if population.count == 0:
            raise ValueError(f"recalibrate: no data reached layer {name!r} on any rank")
    for name, population in populations.items():
        _set(layers[name], population)


def _union(parts: list[Moments]) -> Moments:
    return merge(*(torch.stack(column) for column in zip(*parts, strict=True)))


def _nothing(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None
    zeros = torch.zeros_like(layer.running_mean)
    return Moments(zeros.new_zeros((), dtype=torch.float64), zeros, zeros)


def _over_ranks(own: Moments, name: str) -> Moments:
    if not (dist.is_available() and dist.is_initialized()):
        return own
    assert dist.group.WORLD is not None
    values = torch.cat([own.count.view(1), own.mean.to(torch.float64), own.M2.to(torch.float64)])
    gathered = exchange_of(dist.group.WORLD).gather(
        values,
        kind=FORWARD,
        layer=f"recalibrate {name}",
        channels=own.mean.numel(),
        dtype=values.dtype,
        needs_grad=False,
    )
    means, M2s = gathered[:, 1:].chunk(2, dim=1)
    return merge(gathered[:, 0], means, M2s)


def _set(layer: _BatchNorm, population: Moments) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(population.mean)
    layer.running_var.copy_(population.M2 / (population.count - 1).clamp(min=1))
