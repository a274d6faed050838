"""The layer under torch.compile and torch.export: two operators that the compiler takes as they are.

Tracing cannot look into an exchange, so the forward and the backward pass each become one opaque operator with a
known shape. Both are free of side effects, which is what lets the compiler differentiate them; running statistics are
updated beside them, in plain operations that it fuses.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (
    _resolve_process_group as resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy

from syncbn.norm.backends import EagerKernels, Fused, Running, launched
from syncbn.norm.backends.aten import stats_dtype
from syncbn.norm.comm.exchange import exchange_of
from syncbn.norm.comm.groups import GroupSpec, resolve
from syncbn.norm.moments import Remembered, Statistics
from syncbn.norm.ops.autograd import gradients, normalized, step_by_step, to_keep
from syncbn.norm.ops.collectives import Call
from syncbn.norm.ops.recompute import current


def group_text(spec: GroupSpec) -> str:
    """`spec` as a text that can stand in a graph."""
    if isinstance(spec, ProcessGroup):
        return f"name {spec.group_name}"
    return "world" if spec is None else str(spec)


def _call(eps: float, act: str, mask: Tensor | None, group: str, name: str) -> Call:
    kind, _, group_name = group.partition(" ")
    spec: Any = int(kind) if kind.isdigit() else kind
    found = resolve(spec) if spec != "name" else resolve_process_group(cast(Any, group_name))
    exchange = None if found is None or dist.get_world_size(found) == 1 else exchange_of(found)
    return Call(eps=eps, act=act or None, mask=mask, exchange=exchange, name=name)


@torch.library.custom_op("syncbn::forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    act: str,
    group: str,
    name: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the statistics it was normalised with, and the number of values that count, which is 0 in a replay."""
    call = _call(eps, act, mask, group, name)
    checkpointed = current()
    fused = Fused(call.act, residual, mask)
    known = None if checkpointed is None else checkpointed.known(x.shape[1])
    if known is not None:
        y = normalized(x, weight, bias, fused, Remembered(known.mean, known))
        total, mean, var, invstd = _own(known)
        return y, total, mean, var, invstd, torch.zeros_like(total)
    operands = (x, weight, bias, fused, call, needs_grad)
    # the library's whole pass puts all statistics in one tensor, and an operator's results may share none
    y, found = launched.forward(*operands) or step_by_step(*operands)
    if checkpointed is not None:
        checkpointed.record(_own(found.statistics))
    total, mean, var, invstd = found.statistics
    return y, total, mean, var, invstd, total.clone()


def _own(statistics: Statistics) -> Statistics:
    """A copy, because a compiled graph may reuse the memory of what an operator returns."""
    return Statistics(*(values.clone() for values in statistics))


@_forward.register_fake
def _forward_shapes(
    x: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = x.new_empty(x.shape[1], dtype=stats_dtype(x.dtype))
    total = x.new_empty((), dtype=torch.float64)
    return (
        torch.empty_like(x),
        total,
        channels,
        torch.empty_like(channels),
        torch.empty_like(channels),
        torch.empty_like(total),
    )


@torch.library.custom_op("syncbn::backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    total: Tensor,
    mean: Tensor,
    var: Tensor,
    invstd: Tensor,
    eps: float,
    act: str,
    group: str,
    name: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual; an empty tensor where none is needed."""
    call = _call(eps, act, mask, group, name)
    fused = Fused(call.act, residual, mask, output)
    found = Remembered(mean, Statistics(total, mean, var, invstd))  # nobody asks for its moments
    dx, dweight, dbias, dresidual, _ = gradients(
        dy, x, weight, bias, fused, found, call, tuple(needs)
    )

    def own(gradient: Tensor | None) -> Tensor:
        """An operator's results share memory with nothing, each other included."""
        return x.new_empty(0) if gradient is None else gradient.clone()

    dx = x.new_empty(0) if dx is None else dx
    dresidual = own(dresidual) if dresidual is None or dresidual is dy else dresidual
    return dx, own(dweight), own(dbias), dresidual


@_backward.register_fake
def _backward_shapes(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-1]

    def like(operand: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(operand) if needed and operand is not None else x.new_empty(0)

    return like(x, needs[0]), like(weight, needs[1]), like(bias, needs[2]), like(dy, needs[3])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_in_graph()
    x, weight, bias, residual, mask, eps, act, group, name, _ = inputs
    y, *statistics, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.has_residual = residual is not None
    ctx.rest = (eps, act, group, name)
    kept = to_keep(Fused(act or None, residual), y)
    ctx.save_for_backward(x, weight, bias, *kept, mask, *statistics)


def _keep_in_graph() -> None:
    """Tell a compiler that traces a checkpointed region to keep what the operator gave, and not to exchange again.

    Selective checkpointing notes its policies at the same place; without them the compiler would run the operator again
    in its backward graph.
    """
    tracing = get_proxy_mode()
    if tracing is None:
        return
    for node in reversed(tracing.tracer.graph.nodes):
        if node.target is torch.ops.syncbn.forward.default:
            for kept in (node, *node.users):
                kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            return


def _gradients(ctx: Any, dy: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    found = _backward(dy, *ctx.saved_tensors, *ctx.rest, needs)
    return (
        *(g if needed else None for g, needed in zip(found, needs, strict=True)),
        *(None,) * 6,
    )


_forward.register_autograd(_gradients, setup_context=_remember)
# selective checkpointing around a compiled block would cache some passes, and a replay could not be told by its number
SAC_IGNORED_OPS.add(torch.ops.syncbn.forward.default)


def compiled_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running | None,
    *,
    eps: float,
    act: str | None,
    group: str,
    name: str,
) -> Tensor:
    """`sync_batch_norm` while a compiler traces; `group` is a `group_text`."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    y, _, mean, var, invstd, counted = _forward(
        x, weight, bias, residual, mask, eps, act or "", group, name, needs_grad
    )
    if running is not None:
        EagerKernels().update(running, Statistics(counted, mean, var, invstd))
    return y
