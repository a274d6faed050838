"""The layer under torch.compile and torch.export: two operators that the compiler takes as they are.

Tracing cannot look into an exchange, so the forward and the backward pass each are one opaque operator with known
shapes and strides. Both are free of side effects, which lets the compiler differentiate them; running statistics are
updated beside them, in plain operations that it fuses.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (
    _resolve_process_group as resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy

from syncbn.norm.backends import selected
from syncbn.norm.backends.aten import update
from syncbn.norm.backends.base import NormArgs, Running
from syncbn.norm.backends.layout import memory_format
from syncbn.norm.comm.exchange import exchange_for
from syncbn.norm.comm.groups import GroupSpec
from syncbn.norm.moments import Statistics, stats_dtype
from syncbn.norm.ops.autograd import Call, backward_pass, forward_pass, kept_for_backward
from syncbn.norm.ops.recompute import Pass, current


def group_text(spec: GroupSpec) -> str:
    """`spec` as a text that can stand in a graph."""
    if isinstance(spec, ProcessGroup):
        return f"name {spec.group_name}"
    return "world" if spec is None else str(spec)


def _settings_text(args: NormArgs, group: str, needs_grad: bool) -> str:
    """What both operators know of a pass beside tensors and eps; `group` is a `group_text`."""
    return "\n".join((args.act or "", "grad" if needs_grad else "", group, args.layer))


def _call(
    x: Tensor, mask: Tensor | None, eps: float, settings: str, checkpointed: Pass | None = None
) -> Call:
    act, _, group, layer = settings.split("\n", maxsplit=3)
    kind, _, group_name = group.partition(" ")
    spec: Any = int(kind) if kind.lstrip("-").isdigit() else kind
    if spec == "name":
        spec = resolve_process_group(cast(Any, group_name))
    return Call(
        exchange_for(spec, x), mask, act or None, eps, layer=layer, checkpointed=checkpointed
    )


@torch.library.custom_op("syncbn::forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the statistics it was normalised with, and the number of values that count, which is 0 in a replay."""
    call = _call(x, mask, eps, settings, current())
    args = call.args(x, weight, bias, residual)
    backend = selected(x.device.type).for_pass(args)
    y, stats = forward_pass(args, backend, call, settings.split("\n")[1] == "grad")
    # an operator's results share memory with nothing, and a backend may keep all statistics in one tensor
    mean, var, invstd = (values.clone() for values in (stats.mean, stats.var, stats.invstd))
    replaying = call.checkpointed is not None and call.checkpointed.replaying
    counted = torch.zeros_like(stats.total) if replaying else stats.total.clone()
    return _as_traced(y, x), stats.total.clone(), mean, var, invstd, counted


@_forward.register_fake
def _forward_shapes(
    x: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var, invstd = (x.new_empty(x.shape[1], dtype=stats_dtype(x.dtype)) for _ in range(3))
    total, counted = (x.new_empty((), dtype=torch.float64) for _ in range(2))
    return _empty_like(x), total, mean, var, invstd, counted


@torch.library.custom_op("syncbn::backward", mutates_args=())
def _backward(
    dy: Tensor,
    operands: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    eps: float,
    settings: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual; an empty tensor where none is needed.

    Args:
        dy: the gradient of y.
        operands: x, weight, bias, residual, output and mask, as of `NormArgs`.
        stats: as of `Statistics`.
        eps: added to the variance.
        settings: a `_settings_text`.
        needs: which of x, weight, bias and residual want a gradient.
    """
    x, weight, bias, residual, output, mask = operands
    assert x is not None
    call = _call(x, mask, eps, settings)
    args = call.args(x, weight, bias, residual)._replace(output=output)
    backend = selected(x.device.type).for_pass(args)
    found = backward_pass(dy, args, Statistics(*stats), backend, call, tuple(needs))
    dx, dweight, dbias, dz = (_nothing(x) if gradient is None else gradient for gradient in found)
    dx = _as_traced(dx, x) if needs[0] else dx
    dz = _as_traced(dz, dy) if needs[3] else dz
    # results share memory with nothing, each other and the operands included
    return dx, dweight.clone(), dbias.clone(), dz.clone() if dz is dy else dz


@_backward.register_fake
def _backward_shapes(
    dy: Tensor, operands: Sequence[Tensor | None], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-1]
    x, weight, bias = operands[:3]
    assert x is not None

    def like(operand: Tensor | None, needed: bool) -> Tensor:
        return _nothing(x) if not needed or operand is None else operand.new_empty(operand.shape)

    return (
        _empty_like(x) if needs[0] else _nothing(x),
        like(weight, needs[1]),
        like(bias, needs[2]),
        _empty_like(dy) if needs[3] else _nothing(x),
    )


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _empty_like(x: Tensor) -> Tensor:
    """An uninitialised result, contiguous in the memory format in which `x` is read."""
    return torch.empty_like(x, memory_format=memory_format(x))


def _as_traced(result: Tensor, x: Tensor) -> Tensor:
    """`result` with the strides of `_empty_like(x)`, which is what the compiler was told."""
    expected = torch.empty_like(x, memory_format=memory_format(x), device="meta").stride()
    return result if result.stride() == expected else _empty_like(x).copy_(result)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_in_graph()
    x, weight, bias, residual, mask, eps, settings = inputs
    y, *stats, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.rest, act = (eps, settings), settings.split("\n")[0]
    kept = kept_for_backward(NormArgs(x, residual=residual, act=act or None), y)
    ctx.save_for_backward(x, weight, bias, *kept, mask, *stats)


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
    saved = ctx.saved_tensors
    found = _backward(dy, list(saved[:6]), list(saved[6:]), *ctx.rest, needs)
    return (*(g if needed else None for g, needed in zip(found, needs, strict=True)), *(None,) * 3)


_forward.register_autograd(_gradients, setup_context=_remember)
# selective checkpointing around a compiled block would cache some passes, and a replay could not be told by its number
SAC_IGNORED_OPS.add(torch.ops.syncbn.forward.default)


def compiled_batch_norm(args: NormArgs, group: str, running: Running | None) -> Tensor:
    """`sync_batch_norm` while a compiler traces.

    Args:
        args: of this pass; its running statistics are left alone.
        group: a `group_text`.
        running: what to update, or None.
    """
    needs_grad = torch.is_grad_enabled() and args.x.requires_grad
    y, _, mean, var, invstd, counted = _forward(
        *args[:5], args.eps, _settings_text(args, group, needs_grad)
    )
    if running is not None:
        update(running, Statistics(counted, mean, var, invstd))
    return y
