"""The kernels on a CPU, in C++: each pass reads memory as often as it must and no more.

Results have the same bits with any number of threads and on any instruction set: sums are cut and ordered by the
shape alone. What networks do not do often, masks and mixed dtypes among it, is left to the kernels in ATen.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.norm.kernels.activations import ACTIVATIONS
from syncbn.norm.kernels.eager import EagerKernels, stats_dtype
from syncbn.norm.kernels.operands import Affine, Fused, Running
from syncbn.norm.moments import Statistics
from syncbn.norm.native import library

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
MOMENTS, NORMALIZE, BACKWARD_SUMS, BACKWARD_INPUT, BACKWARD_RESIDUAL = range(5)
NOTHING, RESIDUAL, OUTPUT = range(3)
WIDE = (torch.float32, torch.float64)

_CALL = struct.Struct(
    "8q10P"
)  # `Call` in native/kernels.cpp; packing is faster than a ctypes.Structure
_NO_AFFINE = (0, 0, 0, 0)


class Layout(NamedTuple):
    """An input as the library sees it: `samples` x `channels` x `size` values, one after the other."""

    samples: int
    channels: int
    size: int
    memory_format: torch.memory_format


class CpuKernels:
    """`Kernels` in native code, for CPU tensors.

    Raises:
        RuntimeError: there is no library.
    """

    def __init__(self) -> None:
        self._library = _declared()
        self._eager = EagerKernels()

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Count, mean and M2 per channel; x is read once."""
        if mask is not None or not _native(x):
            return self._eager.moments(x, mask)
        x, layout = _laid_out(x)
        packed = torch.empty(2 + 2 * layout.channels, dtype=stats_dtype(x.dtype))
        shape = (MOMENTS, DTYPES[x.dtype], *layout[:3], torch.get_num_threads(), 0, NOTHING)
        call = _CALL.pack(*shape, x.data_ptr(), 0, 0, *_NO_AFFINE, 0, 0, packed.data_ptr())
        self._library.syncbn_pass(call)
        return packed

    def merge(self, packed: Tensor, eps: float) -> Statistics:
        """What W ranks' moments come down to, in float64 arithmetic."""
        packed = packed.contiguous()
        ranks, width = packed.shape
        channels = (width - 2) // 2
        total = torch.empty((), dtype=torch.float64)
        mean, var, invstd = (torch.empty(channels, dtype=packed.dtype) for _ in range(3))
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
        if not _updatable(running):
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
        increment_version([mean, var] if tracked is None else [mean, var, tracked])

    def normalize(self, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual); x is read once."""
        if not _native(x, fused):
            return self._eager.normalize(x, affine, fused)
        x, layout = _laid_out(x)
        y = torch.empty_like(x)
        self._run(NORMALIZE, layout, y, x, affine, fused)
        return y

    def backward_sums(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """Sum of dz, and sum of dz * xhat, per channel; x and dy are read once."""
        if not _native(x, fused, dy):
            return self._eager.backward_sums(dy, x, affine, fused)
        x, layout = _laid_out(x)
        sums = torch.empty(2, layout.channels, dtype=stats_dtype(x.dtype))
        self._run(BACKWARD_SUMS, layout, sums, x, affine, fused, dy)
        return sums

    def backward_input(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, sums: Tensor, total: Tensor
    ) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat); x and dy are read once."""
        if not _native(x, fused, dy):
            return self._eager.backward_input(dy, x, affine, fused, sums, total)
        x, layout = _laid_out(x)
        dx = torch.empty_like(x)
        self._run(BACKWARD_INPUT, layout, dx, x, affine, fused, dy, sums.contiguous(), total)
        return dx

    def backward_residual(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """The gradient of the residual."""
        if not _native(x, fused, dy):
            return self._eager.backward_residual(dy, x, affine, fused)
        x, layout = _laid_out(x)
        dz = torch.empty_like(x)
        self._run(BACKWARD_RESIDUAL, layout, dz, x, affine, fused, dy)
        return dz

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, fused: Fused
    ) -> tuple[Tensor, Statistics] | None:
        """The whole forward pass of a group of one, part by part while it is in the cache; None if not served."""
        if not _native(x, fused):
            return None
        x, layout = _laid_out(x)
        y = torch.empty_like(x)
        total = torch.empty((), dtype=torch.float64)
        mean, var, invstd = torch.empty(3, layout.channels, dtype=stats_dtype(x.dtype)).unbind()
        merged = (total.data_ptr(), mean.data_ptr(), var.data_ptr(), invstd.data_ptr())
        affine = Affine(mean, invstd, weight, bias)
        self._run(
            NORMALIZE,
            layout,
            y,
            x,
            affine,
            fused,
            run=lambda call: self._library.syncbn_forward(call, eps, *merged),
        )
        return y, Statistics(total, mean, var, invstd)

    def backward(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, total: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The whole backward pass of a group of one: dx, and `backward_sums`; None if not served."""
        if not _native(x, fused, dy):
            return None
        x, layout = _laid_out(x)
        dx = torch.empty_like(x)
        sums = torch.empty(2, layout.channels, dtype=stats_dtype(x.dtype))
        self._run(
            BACKWARD_INPUT,
            layout,
            dx,
            x,
            affine,
            fused,
            dy,
            total=total,
            run=lambda call: self._library.syncbn_backward(call, sums.data_ptr()),
        )
        return dx, sums

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
        run: Callable[[bytes], None] | None = None,
    ) -> None:
        """One pass of the library over x, or what `run` does; the tensors named here live until it is done."""
        extra, extra_is = _extra(fused)
        extra, dy = _aligned(extra, layout), _aligned(dy, layout)
        stats = affine.mean.dtype
        coefficients = [_plain(values, stats) for values in affine]
        call = _CALL.pack(
            kind,
            DTYPES[x.dtype],
            *layout[:3],
            torch.get_num_threads(),
            0 if fused.act is None else ACTIVATIONS[fused.act].code,
            extra_is,
            x.data_ptr(),
            *map(_address, (dy, extra, *coefficients, sums, total)),
            result.data_ptr(),
        )
        (run or self._library.syncbn_pass)(call)


@functools.cache
def _declared() -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    found = library()
    if found is None:
        raise RuntimeError("the native library of syncbn was not built; see syncbn.norm.native")
    pointer, number, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    found.syncbn_pass.argtypes = [ctypes.c_char_p]
    found.syncbn_forward.argtypes = [ctypes.c_char_p, real, *[pointer] * 4]
    found.syncbn_backward.argtypes = [ctypes.c_char_p, pointer]
    found.syncbn_merge.argtypes = [flag, pointer, number, number, real, *[pointer] * 4]
    pair = [flag, pointer, pointer]
    found.syncbn_update.argtypes = [*pair, pointer, real, *pair, pointer, number]
    for name in ("pass", "forward", "backward", "merge", "update"):
        getattr(found, f"syncbn_{name}").restype = None
    return found


def _native(x: Tensor, fused: Fused | None = None, dy: Tensor | None = None) -> bool:
    """Whether the library serves these."""
    dtype = x.dtype
    if dtype not in DTYPES or x.numel() == 0 or (dy is not None and dy.dtype != dtype):
        return False
    if fused is None:
        return True
    extra, _ = _extra(fused)
    exotic = fused.mask is not None or (extra is not None and extra.dtype != dtype)
    return not exotic and not (fused.act == "silu" and dtype == torch.float64)


def _updatable(running: Running) -> bool:
    mean, var, tracked, _ = running
    good = mean.dtype in WIDE and mean.dtype == var.dtype
    good = good and mean.is_contiguous() and var.is_contiguous() and not mean.is_inference()
    return good and (tracked is None or tracked.dtype == torch.int64)


def _extra(fused: Fused) -> tuple[Tensor | None, int]:
    """The third tensor of a pass, and what it is."""
    if fused.output is not None:
        return fused.output, OUTPUT
    return fused.residual, NOTHING if fused.residual is None else RESIDUAL


def _laid_out(x: Tensor) -> tuple[Tensor, Layout]:
    """`x` without gaps, in its own memory format where that is one."""
    samples, channels = x.shape[:2]
    size = x.numel() // (samples * channels)
    if x.is_contiguous():
        return x, Layout(samples, channels, size, torch.contiguous_format)
    memory_format = CHANNELS_LAST.get(x.dim())
    if memory_format is not None and x.stride(1) == 1 and channels > 1:
        x = x.contiguous(memory_format=memory_format)
        return x, Layout(samples * size, channels, 1, memory_format)
    return x.contiguous(), Layout(samples, channels, size, torch.contiguous_format)


def _aligned(values: Tensor | None, layout: Layout) -> Tensor | None:
    """`values` in the order of x."""
    if values is None or values.is_contiguous(memory_format=layout.memory_format):
        return values
    return values.contiguous(memory_format=layout.memory_format)


def _plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if values is None or (values.dtype == dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()
