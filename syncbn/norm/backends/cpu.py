"""The kernels on a CPU, in C++: each pass reads memory as often as it must and no more.

Results have the same bits with any number of threads and on any instruction set: sums are cut and ordered by the
shape alone. What networks do not do often, masks and mixed dtypes among it, is left to the kernels in ATen.
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.norm.backends.aten import EagerKernels, stats_dtype
from syncbn.norm.backends.native_call import (
    BACKWARD_INPUT,
    BACKWARD_RESIDUAL,
    BACKWARD_SUMS,
    MOMENTS,
    NORMALIZE,
    Layout,
    Operands,
    address,
    aligned,
    extra,
    laid_out,
    packed_call,
    plain,
    plain_kind,
    served,
)
from syncbn.norm.backends.operands import Affine, Fused, Running
from syncbn.norm.backends.result_memory import empty_like
from syncbn.norm.moments import Statistics
from syncbn.norm.native import library

WIDE = (torch.float32, torch.float64)


class CpuKernels:
    """`Kernels` in native code, for CPU tensors.

    Raises:
        RuntimeError: there is no library.
    """

    launched = False

    def __init__(self) -> None:
        self._library = _declared()
        self._eager = EagerKernels()

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Count, mean and M2 per channel; x is read once."""
        if mask is not None or not served(x):
            return self._eager.moments(x, mask)
        x, layout = laid_out(x)
        packed = torch.empty(2 + 2 * layout.channels, dtype=stats_dtype(x.dtype), device="cpu")
        call = packed_call(MOMENTS, x, layout, Fused(), Operands(), packed.data_ptr())
        self._library.syncbn_pass(call)
        return packed

    def merge(self, packed: Tensor, eps: float) -> Statistics:
        """What W ranks' moments come down to, in float64 arithmetic."""
        if not plain_kind(packed):
            return self._eager.merge(packed, eps)
        packed = packed.contiguous()
        ranks, width = packed.shape
        channels = (width - 2) // 2
        total = torch.empty((), dtype=torch.float64, device="cpu")
        mean, var, invstd = (
            torch.empty(channels, dtype=packed.dtype, device="cpu") for _ in range(3)
        )
        self._library.syncbn_merge(
            packed.dtype == torch.float64,
            packed.data_ptr(),
            ranks,
            channels,
            eps,
            total.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            invstd.data_ptr(),
        )
        return Statistics(total, mean, var, invstd)

    def update(self, running: Running, statistics: Statistics) -> None:
        """Move the running statistics towards those of this batch."""
        mean, var, tracked, momentum = running
        if not updatable(running):
            self._eager.update(running, statistics)
            return
        self._library.syncbn_update(
            mean.dtype == torch.float64,
            mean.data_ptr(),
            var.data_ptr(),
            0 if tracked is None else tracked.data_ptr(),
            -1.0 if momentum is None else momentum,
            statistics.mean.dtype == torch.float64,
            statistics.mean.data_ptr(),
            statistics.var.data_ptr(),
            statistics.total.data_ptr(),
            mean.numel(),
        )
        moved(running)

    def normalize(self, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual); x is read once."""
        if not served(x, fused):
            return self._eager.normalize(x, affine, fused)
        x, layout = laid_out(x)
        y = empty_like(x)
        self._run(NORMALIZE, layout, y, x, affine, fused)
        return y

    def backward_sums(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """Sum of dz, and sum of dz * xhat, per channel; x and dy are read once."""
        if not served(x, fused, dy):
            return self._eager.backward_sums(dy, x, affine, fused)
        x, layout = laid_out(x)
        sums = torch.empty(2, layout.channels, dtype=stats_dtype(x.dtype), device="cpu")
        self._run(BACKWARD_SUMS, layout, sums, x, affine, fused, dy)
        return sums

    def backward_input(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, sums: Tensor, total: Tensor
    ) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat); x and dy are read once."""
        if not served(x, fused, dy):
            return self._eager.backward_input(dy, x, affine, fused, sums, total)
        x, layout = laid_out(x)
        dx = empty_like(x)
        self._run(BACKWARD_INPUT, layout, dx, x, affine, fused, dy, sums.contiguous(), total)
        return dx

    def backward_residual(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """The gradient of the residual."""
        if not served(x, fused, dy):
            return self._eager.backward_residual(dy, x, affine, fused)
        x, layout = laid_out(x)
        dz = empty_like(x)
        self._run(BACKWARD_RESIDUAL, layout, dz, x, affine, fused, dy)
        return dz

    def _run(
        self,
        kind: int,
        layout: Layout,
        result: Tensor,
        x: Tensor,
        affine: Affine,
        fused: Fused,
        dy: Tensor | None = None,
        sums: Tensor | None = None,
        total: Tensor | None = None,
    ) -> None:
        """One pass of the library over x; the tensors named here live until it is done."""
        third, dy = (t if t is None else aligned(t, layout) for t in (extra(fused), dy))
        coefficients = [plain(values, affine.mean.dtype) for values in affine]
        operands = Operands(*map(address, (*coefficients, dy, third, sums, total)))
        self._library.syncbn_pass(packed_call(kind, x, layout, fused, operands, result.data_ptr()))


@functools.cache
def _declared() -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    found = library()
    if found is None:
        raise RuntimeError("the native library of syncbn was not built; see syncbn.norm.native")
    pointer, number, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    found.syncbn_pass.argtypes = [ctypes.c_char_p]
    found.syncbn_merge.argtypes = [flag, pointer, number, number, real, *[pointer] * 4]
    pair = [flag, pointer, pointer]
    found.syncbn_update.argtypes = [*pair, pointer, real, *pair, pointer, number]
    for name in ("pass", "merge", "update"):
        getattr(found, f"syncbn_{name}").restype = None
    return found


def updatable(running: Running) -> bool:
    """Whether the library moves these running statistics."""
    mean, var, tracked, _ = running
    good = mean.dtype in WIDE and mean.dtype == var.dtype
    good = (
        good
        and plain_kind(mean)
        and mean.is_contiguous()
        and var.is_contiguous()
        and not mean.is_inference()
    )
    return good and (tracked is None or tracked.dtype == torch.int64)


NOTHING_MOVES = (0, 0, 0, 0.0, 0)


def moving_words(running: Running) -> tuple[int, int, int, float, int]:
    """`Moving` of native/kernels_call.h."""
    if not updatable(running):
        return NOTHING_MOVES
    mean, var, tracked, momentum = running
    weight = -1.0 if momentum is None else momentum
    places = mean.data_ptr(), var.data_ptr(), address(tracked)
    return *places, weight, mean.dtype == torch.float64


def moved(running: Running) -> None:
    """Let autograd know that the library has moved running statistics: who kept them has kept something else."""
    mean, var, tracked, _ = running
    increment_version([mean, var] if tracked is None else [mean, var, tracked])
