"""The kernels in ATen operations: any device, any floating dtype, any layout; the reference for the others.

Statistics take two passes, mean first: one pass of sums and squares in float32 loses a variance of 1e-4 beside
a mean of 100 altogether.
"""

import torch
from torch import Tensor

from syncbn.norm.moments import Moments


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` `(C,)` shaped to broadcast against `x` `(N, C, *)`."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


class EagerKernels:
    """`Kernels` in plain ATen operations."""

    def moments(self, x: Tensor) -> Moments:
        """Count, mean and M2 per channel, in two passes."""
        x = x.to(stats_dtype(x.dtype))
        count = x.numel() // x.shape[1]
        mean = x.sum(_reduced(x)) / max(count, 1)
        M2 = (x - _per_channel(mean, x)).square_().sum(_reduced(x))
        # full, not tensor: a copy from the host would stall a GPU
        total = torch.full((), float(count), dtype=torch.float64, device=x.device)
        return Moments(total, mean, M2)

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """(x - mean) * invstd * weight + bias; the mean goes first, so that a large one cancels exactly."""
        scale = invstd if weight is None else invstd * weight
        y = (x.to(mean.dtype) - _per_channel(mean, x)).mul_(_per_channel(scale, x))
        if bias is not None:
            y.add_(_per_channel(bias, x))
        return y.to(x.dtype)

    def backward_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of dy, and sum of dy * xhat, per channel."""
        dy = dy.to(mean.dtype)
        centred = x.to(mean.dtype) - _per_channel(mean, x)
        return dy.sum(_reduced(x)), centred.mul_(dy).sum(_reduced(x)).mul_(invstd)

    def backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        mean_dy: Tensor,
        mean_dy_xhat: Tensor,
    ) -> Tensor:
        """Weight * invstd * (dy - mean_dy - xhat * mean_dy_xhat)."""
        scale = invstd if weight is None else invstd * weight
        dx = (x.to(mean.dtype) - _per_channel(mean, x)).mul_(
            _per_channel(-invstd * mean_dy_xhat, x)
        )
        dx.add_(dy).sub_(_per_channel(mean_dy, x)).mul_(_per_channel(scale, x))
        return dx.to(x.dtype)
