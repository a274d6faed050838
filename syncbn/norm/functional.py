"""`sync_batch_norm`: batch normalisation with the moments of all ranks of a group, as one function."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from syncbn.norm.backends.activations import check_act
from syncbn.norm.backends.base import NonFiniteStatistics, NormArgs, Running
from syncbn.norm.comm.exchange import exchange_for
from syncbn.norm.comm.fingerprint import NAMED
from syncbn.norm.comm.groups import GroupSpec
from syncbn.norm.ops.autograd import Call, SyncBatchNormFunction
from syncbn.norm.ops.custom_op import compiled_batch_norm, group_text
from syncbn.norm.ops.recompute import current
from syncbn.norm.validation import (
    check_operands,
    checked_eps,
    checked_group,
    checked_momentum,
    fitted,
    tell_ranks,
)

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

    A collective: every rank of the group calls it, also with an empty batch. Without torch.distributed it is a
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
        act: None, or a name in `syncbn.norm.backends.activations.ACTIVATIONS`.
        momentum: weight of the new statistics; None averages over all batches (needs num_batches_tracked).
        eps: added to the variance.
        num_batches_tracked: `()`, int64, counted up in place unless the batch is empty on all ranks.
        process_group: see `syncbn.norm.comm.groups.GroupSpec`.
        name: what error messages call the layer.

    Returns:
        The normalised values in the shape, dtype and memory format of `input`.

    Raises:
        ValueError: an argument out of range, shapes or devices that do not fit, one running statistic without the
            other; one value per channel over all ranks; a group that does not contain this rank.
        TypeError: an input that is not floating point, an argument of the wrong type.
        NonFiniteStatistics: NaN, infinite or too large values on any rank of a CPU group (on CUDA, and in a group
            of one, they pass through, as in torch).
        RanksDisagree: the ranks are not all in the same layer, or one cannot come any more (CPU groups).
        RankLost: a rank exited (CPU groups).
    """
    process_group = checked_group(process_group)
    traced = torch.compiler.is_compiling() or get_proxy_mode() is not None
    exchange = None if traced else exchange_for(process_group, input)
    try:
        check_act(act)
        eps, momentum = checked_eps(eps), checked_momentum(momentum)
        check_operands(input, None, mask, residual)
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var: give both or neither")
        if momentum is None and running_mean is not None and num_batches_tracked is None:
            raise ValueError("momentum=None needs num_batches_tracked")
    except (TypeError, ValueError) as error:
        tell_ranks(exchange, input, f"{name}: {error}")
        raise
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
    kept = None if mask is None else fitted(mask, input)
    if traced:
        args = NormArgs(input, weight, bias, residual, kept, act, eps, layer=name)
        return compiled_batch_norm(args, group_text(process_group), running)
    checkpointed, grad_enabled = current(), torch.is_grad_enabled()
    call = Call(exchange, kept, act, eps, running, name, NAMED, checkpointed, grad_enabled)
    return SyncBatchNormFunction.apply(input, weight, bias, residual, call)
