"""Keeps ranks in step when the forward pass fails on some of them alone.

Layers that are synchronised within groups find NaN or infinite input in one group and raise there, while the ranks of
other groups go on and wait in the reduction of gradients. So the failure is handed on as what it is, a loss of NaN:
every rank finishes the step, and all learn of it together where they agree on losses.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.norm import NonFiniteStatistics, SyncBatchNorm


class Lockstep(nn.Module):
    """`model`, whose outputs are NaN where its forward pass finds non-finite statistics.

    Args:
        model: what is trained; gives logits `(N, num_classes)`.
        num_classes: width of the logits.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes

    def forward(self, images: Tensor, *rest: Any) -> Any:
        """Logits `(N, num_classes)` of `images`; all NaN, and so every gradient, after a failure."""
        try:
            return self.model(images, *rest)
        except NonFiniteStatistics:
            # Every parameter takes part, because DistributedDataParallel waits for the gradients of all.
            touched = torch.stack([parameter.sum() for parameter in self.model.parameters()])
            return (touched.sum() * math.nan).expand(len(images), self.num_classes)


def keep_layers_in_step(model: nn.Module) -> None:
    """Let each synchronised layer of `model` give NaN where it finds non-finite statistics.

    The forward pass goes on to its end, and so does the backward pass, with the collectives of all that is in them.
    """
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.forward = _Steady(layer)


class _Steady:
    """Calls `layer`'s own forward pass; NaN that depends on the input and on all parameters where it fails."""

    def __init__(self, layer: SyncBatchNorm) -> None:
        self._layer, self._forward = layer, layer.forward

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return self._forward(input, *args, **kwargs)
        except NonFiniteStatistics:
            touched = sum((one.sum() for one in self._layer.parameters()), input)
            return touched * math.nan
