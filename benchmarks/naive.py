"""A naive synchronised batch norm: torch operations around a differentiable all-reduce.

This is what users without a ready-made layer have on a CPU, and what ours is compared with: the means of x and of
its square averaged over ranks, which is right for equal batches only, and loses digits to cancellation.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AverageOverRanks(torch.autograd.Function):
    """The mean of a tensor over ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        total = values.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total / dist.get_world_size()


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all ranks' batches, which must be equal in size."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(N, C, H, W)` in training; half precision is computed in float32."""
        x = input.float()
        mean, mean_of_squares = _AverageOverRanks.apply(
            torch.stack([x.mean([0, 2, 3]), (x * x).mean([0, 2, 3])])
        )
        var = mean_of_squares - mean * mean
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        self._update(mean.detach(), var.detach())
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(input.dtype)

    def _update(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self.momentum or 0.0
        self.running_mean += momentum * (mean - self.running_mean)
        self.running_var += momentum * (var - self.running_var)
