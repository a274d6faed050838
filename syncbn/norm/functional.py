"""`sync_batch_norm`: batch normalisation with the moments of all ranks of a group, as one function.

It checks what it is given, tells the other ranks when that is unusable, and hands the rest to autograd
(`autograd`), to the exchange (`steps`) and to one rank's arithmetic (`kernels`).
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from syncbn.norm.backends.activations import check_act
from syncbn.norm.backends.base import NonFiniteStatistics, Running
from syncbn.norm.comm.exchange import Exchange, exchange_for
from syncbn.norm.comm.groups import GroupSpec
from syncbn.norm.ops.autograd import Call, SyncBatchNormFunction
from syncbn.norm.ops.recompute import current

__all__ = ["NonFiniteStatistics", "sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: str | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    process_group: GroupSpec = None,
    name: str = "",
) -> Tensor:
    """act(batch_norm(input) + residual), with the mean and variance of each channel over all ranks of a group.

    A collective: every rank of the group calls it, an empty batch included. Without torch.distributed it is a
    group of one. Running statistics are updated in place, with the variance M2 / (N - 1) over all N values.

    Args:
        input: `(N, C, *)` of any floating dtype; statistics are float32, or float64 for float64.
        running_mean: `(C,)`, updated in place; None keeps no running statistics.
        running_var: `(C,)`, likewise.
        weight: `(C,)`; None scales by 1.
        bias: `(C,)`; None adds nothing.
        residual: in the shape of `input`, added before `act`.
        mask: bool, `(N, 1, *)`: positions where it is false are left out of the statistics and of N; they come out
            as 0 and get no gradient.
        act: None, or a name in `syncbn.norm.backends.ACTIVATIONS`.
        momentum: weight of the new statistics; None averages over all batches (needs num_batches_tracked).
        eps: added to the variance.
        num_batches_tracked: `()`, int64, counted up in place unless the batch is empty on all ranks.
        process_group: see `syncbn.norm.comm.groups.GroupSpec`.
        name: what error messages call the layer.

    Returns:
        The normalised values in the shape, dtype and memory format of `input`.

    Raises:
        ValueError: shapes that do not fit, an unknown `act`; one value per channel over all ranks.
        TypeError: an input that is not floating point.
        NonFiniteStatistics: NaN, infinite or too large values on any rank of a CPU group (on CUDA, and in a group
            of one, they pass through, as in torch).
        RanksDisagree: the ranks are not all in the same layer (CPU groups).
    """
    exchange = exchange_for(process_group)
    check_act(act)
    error = complaint(input, None, mask, residual)
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        error = error or ValueError("momentum=None needs num_batches_tracked")
    if error is not None:
        tell(exchange, input, f"{name}: {error}")
        raise error
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
    fitting = None if mask is None else fitted(mask, input)
    call = Call(exchange, fitting, act, eps, running, name, checkpointed=current())
    return SyncBatchNormFunction.apply(input, weight, bias, residual, call)


def without_values(x: Tensor) -> bool:
    """Whether `x` has a shape and no values (a meta or fake tensor): there is nothing to exchange."""
    return x.is_meta or (type(x) is not Tensor and is_fake(x))


def tell(exchange: Exchange | None, input: Tensor, message: str) -> None:
    """Tell the ranks that wait in this exchange that this one cannot take part."""
    if exchange is not None and not input.is_cuda:
        exchange.fail(message)


def fitted(mask: Tensor, input: Tensor) -> Tensor:
    """`mask` as kernels want it: `(N, 1, *)` with the trailing sizes of `input`, contiguous."""
    return mask.expand(input.shape[0], 1, *input.shape[2:]).contiguous()


def complaint(
    input: Tensor, num_features: int | None, mask: Tensor | None, residual: Tensor | None
) -> Exception | None:
    """What is wrong with these operands, as the error to raise; None where nothing is."""
    if input.dim() < 2:
        return ValueError(f"expected input (N, C, *), got {input.dim()}D input")
    if num_features is not None and input.shape[1] != num_features:
        return ValueError(f"expected {num_features} channels, got {input.shape[1]}")
    if not input.is_floating_point():
        return TypeError(f"expected floating-point input, got {input.dtype}")
    if residual is not None and residual.shape != input.shape:
        return ValueError(
            f"expected a residual of shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if residual is not None and residual.device != input.device:
        return ValueError(f"expected a residual on {input.device}, got {residual.device}")
    return None if mask is None else _complaint_of_mask(mask, input)


def _complaint_of_mask(mask: Tensor, input: Tensor) -> Exception | None:
    if mask.device != input.device:
        return ValueError(f"expected a mask on {input.device}, got {mask.device}")
    if mask.dtype != torch.bool:
        return TypeError(f"expected a mask of dtype torch.bool, got {mask.dtype}")
    expected = (input.shape[0], 1, *input.shape[2:])
    fits = mask.dim() == input.dim() and all(
        have in (want, 1) for have, want in zip(mask.shape, expected, strict=True)
    )
    if not fits:
        return ValueError(f"expected a mask that expands to {expected}, got {tuple(mask.shape)}")
    return None
