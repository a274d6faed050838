"""Keeps ranks in step when the forward pass fails on some of them alone.

Layers that are synchronised within groups find NaN or infinite input in one group and raise there, while the ranks of
other groups go on and wait in the reduction of gradients. So the failure is handed on as what it is, a loss of NaN:
every rank finishes the step, and all learn of it together where they agree on losses.
"""

import math

import torch
from torch import Tensor, nn

from syncbn.norm import NonFiniteStatistics


class Lockstep(nn.Module):
    """`model`, whose outputs are NaN where its forward pass finds non-finite statistics.

    Args:
        model: what is trained; gives logits `(N, num_classes)`.
        num_classes: width of the logits.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of `images`; all NaN, and so every gradient, after a failure."""
        try:
            return self.model(images)
        except NonFiniteStatistics:
            # Every parameter takes part, because DistributedDataParallel waits for the gradients of all.
            touched = torch.stack([parameter.sum() for parameter in self.model.parameters()])
            return (touched.sum() * math.nan).expand(len(images), self.num_classes)
