"""The backward pass in operations that autograd can differentiate, and that transforms know.

It serves a backward pass that will be differentiated itself (`create_graph=True`) and one over a batch of gradients
(`is_grads_batched=True`, vectorised jacobians, vmap). The exchange is one of the operations, and its gradient is an
exchange: autograd gives every higher order.
"""

import torch
from torch import Tensor

from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.base import NormArgs
from syncbn.norm.backends.triton.derivative_bits import unpack_bits
from syncbn.norm.comm.exchange import Exchange, Fingerprint
from syncbn.norm.moments import stats_dtype
from syncbn.norm.ops.collectives import sum_over_ranks

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight, bias and residual."""


def differentiable_gradients(
    dy: Tensor, args: NormArgs, total: Tensor, exchange: Exchange | None, what: Fingerprint
) -> Gradients:
    """The gradients of x, weight, bias and residual, as differentiable functions of dy and of the operands.

    Statistics are computed again as functions of x: their gradients are what a second derivative is made of.

    Args:
        dy: the gradient of y, maybe batched by vmap.
        args: of this pass.
        total: values per channel over all ranks, `()`.
        exchange: with the other ranks; None for this rank alone.
        what: the pass.
    """
    weight, bias = args.weight, args.bias
    # what the mask leaves out may be NaN, which neither a factor of 0 nor its derivative takes back
    x, dy = (_masked(values, args.mask) for values in (args.x, dy))
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    total = total.clamp(min=1)

    def mean_over_ranks(*values: Tensor) -> list[Tensor]:
        sums = torch.stack([_masked(v, args.mask).sum(dims) for v in values])  # (k, C)
        means = sum_over_ranks(sums, exchange, what) / total.to(sums.dtype)
        return [row.view(shape) for row in means]

    x = x.to(stats_dtype(x.dtype))
    (mean,) = mean_over_ranks(x)
    (var,) = mean_over_ranks((x - mean).square())
    invstd = torch.rsqrt(var + args.eps)
    xhat = (x - mean) * invstd
    scale = 1 if weight is None else weight.view(shape)
    dz = dy.to(x.dtype)
    if args.act is not None:
        z = args.output if args.bits is None else unpack_bits(args.bits, args.x)
        if z is None:
            z = xhat * scale if bias is None else xhat * scale + bias.view(shape)
            z = z if args.residual is None else z + _masked(args.residual, args.mask)
        dz = dz * ACTIVATIONS[args.act].derivative(z.to(x.dtype))
    mean_dz, mean_dz_xhat = mean_over_ranks(dz, dz * xhat)
    dx = _masked(scale * invstd * (dz - mean_dz - xhat * mean_dz_xhat), args.mask)
    dweight, dbias = (dz * xhat).sum(dims), dz.sum(dims)
    return (
        dx.to(args.x.dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        dz.to(dy.dtype),
    )


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, 0)
