"""A whole pass by kernels that are launched, in as few launches as there can be.

Between its exchange and the next layer a pass on a GPU is short; what takes long is the host, which spends more on each
launch and each allocation than most layers' kernels do on the device. So what comes before the exchange is one
reduction, and all that follows it one kernel, which merges ranks itself. What is rare is left to the steps:
empty batches, one value per channel.
"""

import torch
from torch import Tensor

from syncbn.norm.backends import Affine, Fused, LaunchedKernels, launched_kernels
from syncbn.norm.backends.native_call import plain_kind
from syncbn.norm.moments import Found, Remembered
from syncbn.norm.ops.collectives import Call, Reduced, check, moments_over_ranks


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    call: Call,
    needs_grad: bool,
) -> tuple[Tensor, Remembered] | None:
    """The output and what it was normalised with, running statistics updated; None where this way does not serve."""
    kernel = kernels_of(x)
    if kernel is None:
        return None
    own = kernel.moments(x, call.mask)
    packed = moments_over_ranks(own, x, call, needs_grad)
    return finished(kernel, x, own, packed, weight, bias, fused, call)


def kernels_of(x: Tensor) -> LaunchedKernels | None:
    """The kernels that are launched over `x`; None where it has others, or is left to the steps."""
    kernel = launched_kernels(x)
    served = kernel is not None and x.numel() > x.shape[1] and plain_kind(x)
    return kernel if served else None


def finished(
    kernel: LaunchedKernels,
    x: Tensor,
    own: Tensor,
    packed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    call: Call,
) -> tuple[Tensor, Remembered]:
    """The rest of a forward pass, from what the ranks sent."""
    looks = call.mask is not None  # how much it leaves is seen only now
    running = None if looks else call.running
    y, statistics = kernel.finish(x, packed, call.eps, weight, bias, fused, running)
    if looks:
        check(packed, statistics, call, x)
        if call.running is not None:
            kernel.update(call.running, statistics)
    return y, Remembered(own, statistics)


def reduced(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
    needs_residual: bool,
) -> Reduced | None:
    """The first half of a backward pass; None where this way does not serve.

    Where the residual's gradient is a tensor of its own, the reduction writes it too, and the second kernel reads it in
    the place of all that it was computed from.
    """
    kernel = launched_kernels(x)
    if kernel is None or not x.numel() or not plain_kind(x):
        return None
    x = kernel.dense(x)
    total, mean, _, invstd = found.statistics
    affine = Affine(mean, invstd, weight, bias)
    dz = None
    if needs_residual and (fused.act is not None or fused.mask is not None):
        dz = torch.empty_like(x, dtype=dy.dtype)
    sums = kernel.backward_sums(dy, x, affine, fused, dz)
    if dz is not None:
        dy, fused = dz, Fused(mask=fused.mask)
    return Reduced(
        sums,
        dy if needs_residual else None,
        lambda rows: kernel.backward_input(dy, x, affine, fused, rows.contiguous(), total),
    )
