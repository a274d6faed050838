"""The ATen backend: any device, any floating dtype, any layout; the reference for the others.

Statistics take two passes, mean first: one pass of sums and squares in float32 loses a variance of 1e-4 beside
a mean of 100 altogether.
"""

import torch
from torch import Tensor

from syncbn.norm.backends.activations import ACTIVATIONS, apply_act
from syncbn.norm.backends.base import Backend, NormArgs, Running, check_statistics
from syncbn.norm.moments import (
    Moments,
    Statistics,
    Stats,
    add_rows,
    merge,
    pack,
    stats_dtype,
    unpack,
)


class AtenBackend(Backend):
    """`Backend` in ATen operations."""

    def local_stats(self, args: NormArgs) -> Tensor:
        """Count, mean and M2 per channel, in two passes."""
        x, mask = args.x.to(stats_dtype(args.x.dtype)), args.mask
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

    def finish_forward(self, args: NormArgs, gathered: Tensor) -> tuple[Tensor, Stats]:
        """Merge in float64, update, normalise."""
        total, mean, M2 = merge(*unpack(gathered))
        var = M2 / total.clamp(min=1).to(M2.dtype)
        stats = Statistics(total, mean, var, torch.rsqrt(var + args.eps))
        check_statistics(gathered, stats, args)
        if args.running is not None:
            update(args.running, stats)
        return self.normalize(args, stats), stats

    def normalize(self, args: NormArgs, stats: Stats) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual)."""
        y = apply_act(args.act, _pre_activation(args, stats))
        return _masked(y, args.mask).to(args.x.dtype)

    def local_grad_sums(
        self, dy: Tensor, args: NormArgs, stats: Stats, needs_dz: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of dz, and sum of dz * xhat, per channel."""
        residual_gradient = None
        if needs_dz:
            dy = residual_gradient = self.grad_residual(dy, args, stats)
            args = args.before_act()
        x, dz = args.x, _grad_before_act(dy, args, stats)
        centred = x.to(dz.dtype) - _per_channel(stats.mean, x)
        centred = _masked(centred.mul_(dz), args.mask)
        sums = torch.stack([dz.sum(_reduced(x)), centred.sum(_reduced(x)).mul_(stats.invstd)])
        return sums, residual_gradient

    def finish_backward(self, dy: Tensor, args: NormArgs, stats: Stats, gathered: Tensor) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat)."""
        x, dz, sums = args.x, _grad_before_act(dy, args, stats), add_rows(gathered)
        mean_dz, mean_dz_xhat = sums.view(2, -1) / stats.total.clamp(min=1).to(sums.dtype)
        scale = stats.invstd if args.weight is None else stats.invstd * args.weight
        dx = x.to(dz.dtype) - _per_channel(stats.mean, x)
        dx.mul_(_per_channel(-stats.invstd * mean_dz_xhat, x))
        dx.add_(dz).sub_(_per_channel(mean_dz, x)).mul_(_per_channel(scale, x))
        return _masked(dx, args.mask).to(x.dtype)

    def grad_residual(self, dy: Tensor, args: NormArgs, stats: Stats) -> Tensor:
        """The gradient of the residual."""
        if args.act is None and args.mask is None:
            return dy
        return _grad_before_act(dy, args, stats).to(dy.dtype)


def update(running: Running, stats: Stats) -> None:
    """Move running statistics, of any kind of tensor, towards those of a batch; an empty one moves nothing."""
    total, tracked = stats.total, running.num_batches_tracked
    seen = (total > 0).to(torch.float64)
    if tracked is not None:
        tracked.add_(seen.to(tracked.dtype))
    if running.momentum is not None:
        factor = seen * running.momentum
    else:
        assert tracked is not None, "momentum=None needs num_batches_tracked"
        factor = seen / tracked.clamp(min=1)
    unbiased = stats.var * (total / (total - 1).clamp(min=1))
    for old, new in ((running.mean, stats.mean), (running.var, unbiased)):
        weight = factor.to(old.dtype)
        old.mul_(1 - weight).add_(new.to(old.dtype) * weight)


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` `(C,)` shaped to broadcast against `x` `(N, C, *)`."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def _pre_activation(args: NormArgs, stats: Stats) -> Tensor:
    """z, in the statistics' dtype; the mean goes first, so that a large one cancels exactly."""
    x, weight = args.x, args.weight
    scale = stats.invstd if weight is None else stats.invstd * weight
    z = (x.to(stats.mean.dtype) - _per_channel(stats.mean, x)).mul_(_per_channel(scale, x))
    if args.bias is not None:
        z.add_(_per_channel(args.bias, x))
    return z if args.residual is None else z.add_(args.residual)


def _grad_before_act(dy: Tensor, args: NormArgs, stats: Stats) -> Tensor:
    """dz, in the statistics' dtype."""
    dz = dy.to(stats.mean.dtype)
    if args.act is not None:
        z = _pre_activation(args, stats) if args.output is None else args.output
        dz = dz * ACTIVATIONS[args.act].derivative(z.to(dz.dtype))
    return _masked(dz, args.mask)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    # a copy filled in place keeps the layout of `values`, which masked_fill takes from the mask
    return values if mask is None else values.clone().masked_fill_(~mask, 0)
