"""The kernels in ATen operations: any device, any floating dtype, any layout; the reference for the others.

Statistics take two passes, mean first: one pass of sums and squares in float32 loses a variance of 1e-4 beside
a mean of 100 altogether.
"""

import torch
from torch import Tensor

from syncbn.norm.backends.activations import ACTIVATIONS, apply_act
from syncbn.norm.backends.operands import Affine, Fused, Running
from syncbn.norm.moments import Moments, Statistics, merge, pack, unpack


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

    launched = False

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Count, mean and M2 per channel, in two passes."""
        x = x.to(stats_dtype(x.dtype))
        if mask is None:
            # full, not tensor: a copy from the host would stall a GPU
            values = float(x.numel() // x.shape[1])
            count = torch.full((), values, dtype=torch.float64, device=x.device)
        else:
            count = mask.sum(dtype=torch.float64)
            x = x.masked_fill(~mask, 0)
        mean = x.sum(_reduced(x)) / count.clamp(min=1).to(x.dtype)
        deviations = x - _per_channel(mean, x)
        if mask is not None:
            deviations.masked_fill_(~mask, 0)
        return pack(Moments(count, mean, deviations.square_().sum(_reduced(x))))

    def merge(self, packed: Tensor, eps: float) -> Statistics:
        """What W ranks' moments come down to."""
        total, mean, M2 = merge(*unpack(packed))
        var = M2 / total.clamp(min=1).to(M2.dtype)
        return Statistics(total, mean, var, torch.rsqrt(var + eps))

    def update(self, running: Running, statistics: Statistics) -> None:
        """Move the running statistics towards those of this batch."""
        total = statistics.total
        seen = (total > 0).to(torch.float64)
        if running.num_batches_tracked is not None:
            running.num_batches_tracked.add_(seen.to(running.num_batches_tracked.dtype))
        if running.momentum is not None:
            factor = seen * running.momentum
        else:
            assert running.num_batches_tracked is not None, (
                "momentum=None needs num_batches_tracked"
            )
            factor = seen / running.num_batches_tracked.clamp(min=1)
        unbiased = statistics.var * (total / (total - 1).clamp(min=1))
        for old, new in ((running.mean, statistics.mean), (running.var, unbiased)):
            weight = factor.to(old.dtype)
            old.mul_(1 - weight).add_(new.to(old.dtype) * weight)

    def normalize(self, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual)."""
        y = apply_act(fused.act, _normalized(x, affine, fused.residual))
        return _masked(y, fused.mask).to(x.dtype)

    def backward_sums(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """Sum of dz, and sum of dz * xhat, per channel."""
        dz = _before_act(dy, x, affine, fused)
        centred = x.to(dz.dtype) - _per_channel(affine.mean, x)
        centred = _masked(centred.mul_(dz), fused.mask)
        return torch.stack([dz.sum(_reduced(x)), centred.sum(_reduced(x)).mul_(affine.invstd)])

    def backward_input(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, sums: Tensor, total: Tensor
    ) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat)."""
        dz = _before_act(dy, x, affine, fused)
        mean_dz, mean_dz_xhat = sums / total.clamp(min=1).to(sums.dtype)
        scale = affine.invstd if affine.weight is None else affine.invstd * affine.weight
        dx = x.to(dz.dtype) - _per_channel(affine.mean, x)
        dx.mul_(_per_channel(-affine.invstd * mean_dz_xhat, x))
        dx.add_(dz).sub_(_per_channel(mean_dz, x)).mul_(_per_channel(scale, x))
        return _masked(dx, fused.mask).to(x.dtype)

    def backward_residual(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """The gradient of the residual."""
        return _before_act(dy, x, affine, fused).to(dy.dtype)


def _normalized(x: Tensor, affine: Affine, residual: Tensor | None) -> Tensor:
    """z, in the statistics' dtype; the mean goes first, so that a large one cancels exactly."""
    scale = affine.invstd if affine.weight is None else affine.invstd * affine.weight
    z = (x.to(affine.mean.dtype) - _per_channel(affine.mean, x)).mul_(_per_channel(scale, x))
    if affine.bias is not None:
        z.add_(_per_channel(affine.bias, x))
    return z if residual is None else z.add_(residual)


def _before_act(dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
    """dz, in the statistics' dtype."""
    dz = dy.to(affine.mean.dtype)
    if fused.act is not None:
        z = fused.output
        if z is None:
            z = _normalized(x, affine, fused.residual)
        dz = dz * ACTIVATIONS[fused.act].derivative(z.to(dz.dtype))
    return _masked(dz, fused.mask)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    # a copy filled in place keeps the layout of `values`, which masked_fill takes from the mask
    return values if mask is None else values.clone().masked_fill_(~mask, 0)
