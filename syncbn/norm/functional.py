"""`sync_batch_norm`: batch normalisation with the moments of all ranks of a group, as one function.

The conductor only orders the parts: kernels reduce this rank's values, one exchange brings every rank's
moments, `merge` makes them one, kernels normalise. The backward pass has the same shape. dweight and dbias stay
local sums, because DistributedDataParallel averages them; reducing them here would count them twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from syncbn.norm import kernels
from syncbn.norm.exchange import BACKWARD, FORWARD, Exchange, exchange_of
from syncbn.norm.groups import GroupSpec, resolve
from syncbn.norm.moments import Moments, merge

_LOW_BITS = 2**20


class NonFiniteStatistics(FloatingPointError):
    """NaN or infinite input on some rank; raised on every rank, running statistics untouched."""

    exit_code = 8


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    process_group: GroupSpec = None,
    name: str = "",
) -> Tensor:
    """Normalise `input` with the mean and variance of its channels over all ranks of a group.

    A collective: every rank of the group calls it, an empty batch included. Without torch.distributed it is a
    group of one. Running statistics are updated in place, with the variance M2 / (N - 1) over all N values.

    Args:
        input: `(N, C, *)` of any floating dtype; statistics are float32, or float64 for float64.
        running_mean: `(C,)`, updated in place; None keeps no running statistics.
        running_var: `(C,)`, likewise.
        weight: `(C,)`; None scales by 1.
        bias: `(C,)`; None adds nothing.
        momentum: weight of the new statistics; None averages over all batches (needs num_batches_tracked).
        eps: added to the variance.
        num_batches_tracked: `()`, int64, counted up in place unless the batch is empty on all ranks.
        process_group: see `syncbn.norm.groups.GroupSpec`.
        name: what error messages call the layer.

    Returns:
        The normalised values in the shape, dtype and memory format of `input`.

    Raises:
        ValueError: one value per channel over all ranks.
        NonFiniteStatistics: NaN or infinite values on any rank (CPU; on CUDA they pass through, as in torch).
        RanksDisagree: the ranks are not all in the same layer (CPU groups).
    """
    group = resolve(process_group)
    function = _SyncBatchNorm.apply
    output, mean, var, total = function(input, weight, bias, eps, group, name)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            factor = _count_batch(num_batches_tracked, momentum, total)
            _update(running_mean, mean, factor)
            _update(running_var, var * (total / (total - 1).clamp(min=1)), factor)
    return output


def _count_batch(
    num_batches_tracked: Tensor | None, momentum: float | None, total: Tensor
) -> Tensor:
    """Count this batch, and return the weight of its statistics: 0 for a batch empty everywhere."""
    seen = (total > 0).to(torch.float64)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(seen.to(num_batches_tracked.dtype))
    if momentum is not None:
        return seen * momentum
    assert num_batches_tracked is not None, "momentum=None needs num_batches_tracked"
    return seen / num_batches_tracked.clamp(min=1)


def _update(running: Tensor, new: Tensor, factor: Tensor) -> None:
    factor = factor.to(running.dtype)
    running.mul_(1 - factor).add_(new.to(running.dtype) * factor)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: ProcessGroup | None,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel = kernels.pick(x)
        exchange = None if group is None else exchange_of(group)
        ctx.place = (exchange, name, x.dtype)
        total, mean, M2 = _merged(kernel.moments(x), ctx.place, ctx.needs_input_grad[0])
        var = M2 / total.clamp(min=1).to(M2.dtype)
        invstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, mean, invstd, weight, total)
        ctx.mark_non_differentiable(mean, var, total)
        return kernel.normalize(x, mean, invstd, weight, bias), mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, invstd, weight, total = ctx.saved_tensors
        kernel = kernels.pick(x)
        sum_dy, sum_dy_xhat = kernel.backward_sums(dy, x, mean, invstd)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = _summed(torch.stack([sum_dy, sum_dy_xhat]), ctx.place)
            means = sums / total.clamp(min=1).to(sums.dtype)
            dx = kernel.backward_input(dy, x, mean, invstd, weight, means[0], means[1])
        dweight = sum_dy_xhat.to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = sum_dy.to(sum_dy.dtype if weight is None else weight.dtype)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None, None, None


Place = tuple[Exchange | None, str, torch.dtype]


def _merged(own: Moments, place: Place, needs_grad: bool) -> Moments:
    """The moments over all ranks; the same bits on each.

    The count travels as two values below 2^20 x 2^24, because a float32 alone is exact only to 2^24.
    """
    exchange, name, dtype = place
    low = own.count % _LOW_BITS
    counts = torch.stack([low, (own.count - low) / _LOW_BITS]).to(own.mean.dtype)
    gathered = torch.cat([counts, own.mean, own.M2]).unsqueeze(0)
    channels = own.mean.numel()
    if exchange is not None:
        gathered = exchange.gather(
            gathered[0],
            kind=FORWARD,
            layer=name,
            channels=channels,
            dtype=dtype,
            needs_grad=needs_grad,
        )
    _check_finite(gathered, name)
    each = gathered[:, :2].to(torch.float64)
    merged = merge(
        each[:, 0] + each[:, 1] * _LOW_BITS,
        gathered[:, 2 : 2 + channels],
        gathered[:, 2 + channels :],
    )
    _check_count(merged.count, name)
    return merged


def _summed(sums: Tensor, place: Place) -> Tensor:
    """`sums` `(2, C)` over all ranks, added in rank order: the same bits on each."""
    exchange, name, dtype = place
    if exchange is None:
        return sums
    gathered = exchange.gather(
        sums.flatten(),
        kind=BACKWARD,
        layer=name,
        channels=sums.shape[1],
        dtype=dtype,
        needs_grad=True,
    )
    return gathered.sum(0).view_as(sums)


def _check_finite(gathered: Tensor, name: str) -> None:
    """Raise where a rank's moments are not finite; on CUDA looking would stall the host."""
    if gathered.is_cuda or bool(torch.isfinite(gathered).all()):
        return
    rank = int((~torch.isfinite(gathered)).any(1).nonzero()[0])
    raise NonFiniteStatistics(
        f"SyncBatchNorm {name!r}: NaN or infinite input on rank {rank} of its group; "
        "running statistics are unchanged"
    )


def _check_count(total: Tensor, name: str) -> None:
    if total.is_cuda:
        torch._assert_async(total != 1)  # pyright: ignore[reportPrivateImportUsage]
    elif total == 1:
        raise ValueError(
            f"SyncBatchNorm {name!r}: expected more than 1 value per channel over all ranks when training"
        )
