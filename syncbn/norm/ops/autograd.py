"""The layer as a function that autograd knows: forward and backward, each with one exchange.

Three decisions:

* dweight and dbias stay local sums, because DistributedDataParallel averages them; reducing them here too would count
  them twice.
* Statistics are kept on the node, not among its saved tensors: activation checkpointing computes saved tensors
  again, and these must be the ones of the first time.
* A backward pass that will be differentiated itself (`create_graph=True`) is written in differentiable operations,
  the exchange among them, whose own gradient is an exchange. Autograd then gives every higher order.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from syncbn.norm import backends as kernels
from syncbn.norm.backends import ACTIVATIONS, Affine, Fused, apart, launched, whole
from syncbn.norm.backends.bits import unpacked
from syncbn.norm.backends.formats import memory_format
from syncbn.norm.backends.native_call import plain
from syncbn.norm.moments import Found, Remembered
from syncbn.norm.ops.collectives import (
    Call,
    Reduced,
    addends_over_ranks,
    forward_statistics,
    sums_over_ranks,
)
from syncbn.norm.ops.recompute import unobserved
from syncbn.norm.sums import in_order

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]
Needs = tuple[bool, ...]
"""Which of x, weight, bias and residual want a gradient."""


class SyncBatchNormFunction(torch.autograd.Function):
    """y = act(batch_norm(x) + residual) over the ranks of `call.exchange`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Normalise; keep what backward needs and no more."""
        ctx.call = call
        # selective checkpointing watches operations, and wants the same ones in a replay
        with nullcontext() if call.checkpointed is None else unobserved():
            fused = room(ctx, x, residual)
            y, ctx.found = forward(x, weight, bias, fused, call, ctx.needs_input_grad[0])
            keep(ctx, x, weight, bias, fused, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        """The gradients of x, weight, bias and residual."""
        x, weight, bias, fused = kept(ctx)
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            total = ctx.found.statistics.total
            return differentiable_gradients(dy, x, weight, bias, fused, total, ctx.call, needs)
        return gradients(dy, x, weight, bias, fused, ctx.found, ctx.call, needs)


def room(ctx: Any, x: Tensor, residual: Tensor | None) -> Fused:
    """What `ctx.call` fuses, with room for the bits that backward will need."""
    bits = None
    if residual is not None and any(ctx.needs_input_grad):
        bits = kernels.room_for_bits(x, ctx.call.act)
        # how bits lie follows from that, and hooks on saved tensors may bring x back in another one
        ctx.memory_format = memory_format(x)
    return Fused(ctx.call.act, residual, ctx.call.mask, bits=bits)


def keep(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, fused: Fused, y: Tensor
) -> None:
    """Save what backward needs and no more."""
    ctx.save_for_backward(x, weight, bias, *to_keep(fused, y), fused.bits)


def kept(ctx: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Fused]:
    """x, weight, bias and what was fused, as saved."""
    x, weight, bias, residual, output, bits = ctx.saved_tensors
    if bits is not None:
        x = x.contiguous(memory_format=ctx.memory_format)
    return x, weight, bias, Fused(ctx.call.act, residual, ctx.call.mask, output, bits)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    call: Call,
    needs_grad: bool,
) -> tuple[Tensor, Found]:
    """y, and what it was normalised with, the shortest way there is; a replay takes the statistics of its first run."""
    checkpointed = call.checkpointed
    if checkpointed is None:
        return first(x, weight, bias, fused, call, needs_grad)
    known = checkpointed.known(x.shape[1])
    if known is not None:
        found = Remembered(known.mean, known)  # nobody asks for its moments
        return normalized(x, weight, bias, fused, found), found
    y, found = first(x, weight, bias, fused, call, needs_grad)
    checkpointed.record(found.statistics)
    return y, found


def first(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    call: Call,
    needs_grad: bool,
) -> tuple[Tensor, Found]:
    """`forward` of a pass that is no replay."""
    if kernels.launched_kernels(x) is None:
        done = whole.forward(x, weight, bias, fused.residual, call, needs_grad)
    else:
        done = launched.forward(x, weight, bias, fused, call, needs_grad)
    return done or step_by_step(x, weight, bias, fused, call, needs_grad)


def step_by_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    call: Call,
    needs_grad: bool,
) -> tuple[Tensor, Remembered]:
    """y, and what it was normalised with, by any kernels and any exchange."""
    found = forward_statistics(x, kernels.pick(x), call, needs_grad)
    return normalized(x, weight, bias, fused, found), found


def normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, fused: Fused, found: Found
) -> Tensor:
    """y, by any kernels."""
    affine = Affine(found.statistics.mean, found.statistics.invstd, weight, bias)
    return kernels.pick(x).normalize(x, affine, fused)


def to_keep(fused: Fused, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Residual and output, as far as backward needs them: z is computed again from x where that is enough."""
    act, residual = fused.act, fused.residual
    if act is None or residual is None or fused.bits is not None:
        return None, None
    return (None, y) if ACTIVATIONS[act].from_output else (residual, None)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
    call: Call,
    needs: Needs,
) -> Gradients:
    """dx, dweight, dbias and the residual's gradient, by the kernels."""
    dx = dweight = dbias = dresidual = None
    if needs[0] and kernels.launched_kernels(x) is not None:
        half = reduced(dy, x, weight, bias, fused, found, needs[3])
        dx = half.finish(addends_over_ranks(half.sums, x, call))
        dweight, dbias = parameters(half.sums, weight, bias, needs)
        return dx, dweight, dbias, half.dresidual, None
    if needs[3]:
        dy, fused = undone(dy, x, weight, bias, fused, found)
        dresidual = dy
    if any(needs[:3]):
        done = whole.backward(dy, x, weight, bias, fused, found, call) if needs[0] else None
        dx, sums = done or _summed(dy, x, weight, bias, fused, found, call, needs[0])
        dweight, dbias = parameters(sums, weight, bias, needs)
    return dx, dweight, dbias, dresidual, None


def _summed(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
    call: Call,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """dx, where it is needed, and the sums of this rank, by any kernels and any exchange."""
    half = reduced(dy, x, weight, bias, fused, found, needs_residual=False)
    dx = half.finish(addends_over_ranks(half.sums, x, call)) if needs_dx else None
    return dx, half.sums


def undone(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
) -> tuple[Tensor, Fused]:
    """The residual's gradient: wanted in any case, it takes the place of dy, and nothing is left to undo."""
    if fused.act is not None or fused.mask is not None:
        affine = Affine(found.statistics.mean, found.statistics.invstd, weight, bias)
        dy = kernels.pick(x).backward_residual(dy, x, affine, fused)
    return dy, Fused(mask=fused.mask)


def reduced(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
    needs_residual: bool,
) -> Reduced:
    """The first half of a backward pass, by any kernels."""
    done = launched.reduced(dy, x, weight, bias, fused, found, needs_residual)
    if done is not None:
        return done
    if needs_residual:
        dy, fused = undone(dy, x, weight, bias, fused, found)
    kernel, (total, mean, _, invstd) = kernels.pick(x), found.statistics
    affine = Affine(mean, invstd, weight, bias)
    sums = kernel.backward_sums(dy, x, affine, fused)

    def finish(rows: Tensor) -> Tensor:
        dx = apart.input_gradient(dy, x, weight, bias, fused, found, rows)
        if dx is not None:
            return dx
        everyones = in_order(rows).view_as(sums)
        return kernel.backward_input(dy, x, affine, fused, everyones, total)

    return Reduced(sums, dy if needs_residual else None, finish)


def parameters(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias: this rank's sums of dz * xhat and of dz, in that order."""
    dbias, dweight = sums.unbind()
    return (
        None if weight is None or not needs[1] else plain(dweight, weight.dtype),
        None if bias is None or not needs[2] else plain(dbias, bias.dtype),
    )


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks of `(k, C)`; what one rank's values do to the sum, they do to every rank's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, call: Call) -> Tensor:
        ctx.rest = (x, call)
        return sums_over_ranks(values, x, call).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _SumOverRanks.apply(gradient, *ctx.rest), None, None


def differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    total: Tensor,
    call: Call,
    needs: Needs,
) -> Gradients:
    """The same gradients in operations that autograd can differentiate.

    Statistics are computed again as functions of x: their gradients are what a second derivative is made of.
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    total = total.clamp(min=1)

    def over_ranks(*values: Tensor) -> list[Tensor]:
        sums = torch.stack([_masked(v, fused.mask).sum(dims) for v in values])
        rows = _SumOverRanks.apply(sums, x.detach(), call) / total.to(sums.dtype)
        return [row.view(shape) for row in rows]

    wide = x.double() if x.dtype == torch.float64 else x.float()
    (mean,) = over_ranks(wide)
    (var,) = over_ranks((wide - mean).square())
    invstd = torch.rsqrt(var + call.eps)
    xhat = (wide - mean) * invstd
    scale = 1 if weight is None else weight.view(shape)
    dz = dy.to(wide.dtype)
    if fused.act is not None:
        z = fused.output if fused.bits is None else unpacked(fused.bits, x)
        if z is None:
            z = xhat * scale if bias is None else xhat * scale + bias.view(shape)
            z = z if fused.residual is None else z + fused.residual
        dz = dz * ACTIVATIONS[fused.act].derivative(z.to(wide.dtype))
    dz = _masked(dz, fused.mask)
    mean_dz, mean_dz_xhat = over_ranks(dz, dz * xhat)
    dx = _masked(scale * invstd * (dz - mean_dz - xhat * mean_dz_xhat), fused.mask)
    sums = torch.stack([dz.sum(dims), (dz * xhat).sum(dims)])
    return (
        dx.to(x.dtype),
        *parameters(sums, weight, bias, needs),
        dz.to(dy.dtype) if needs[3] else None,
        None,
    )


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, 0)
