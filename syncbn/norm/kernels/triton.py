"""The kernels in Triton, for CUDA tensors: each reads its input once, and nothing waits for the device.

A layer is four or five launches forward (moments, combined where programs shared a channel; merge; update;
normalize) and two or three backward, each between two plain allocations: what runs can be captured in a CUDA graph,
and this file is thin because below a few million values the host's time is the layer's time. Only code that has met
a CUDA tensor imports it, so the layer works without Triton.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncbn.norm.kernels import triton_maps as maps
from syncbn.norm.kernels import triton_reductions as reductions
from syncbn.norm.kernels import triton_statistics as per_channel
from syncbn.norm.kernels.activations import ACTIVATIONS
from syncbn.norm.kernels.eager import EagerKernels, stats_dtype
from syncbn.norm.kernels.operands import Affine, Fused, Running
from syncbn.norm.kernels.triton_tiles import memory_format, tiling_of
from syncbn.norm.moments import Statistics

ROWS_AT_ONCE = 256
"""Rows that a merge holds in registers; more come in turns."""

VALUES_AT_ONCE = 2048
"""Values, over rows and channels, that a merge or an update holds in registers."""

_EAGER = EagerKernels()


class TritonKernels:
    """`Kernels` in Triton; with `TRITON_INTERPRET=1` they run on CPU tensors, slowly."""

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Packed moments in one pass over `x`, one more launch where several programs share a channel."""
        dtype, width = stats_dtype(x.dtype), 2 + 2 * x.shape[1]
        if x.numel() == 0:
            return torch.zeros(width, dtype=dtype, device=x.device)
        x = _dense(x)
        tiling = tiling_of(x)
        rows = _table(tiling.grid[1], width, dtype, x.device)
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        _launch(
            reductions.moments_kernel, tiling.grid, x, _bytes(mask), rows, *tiling.arguments, acc
        )
        if len(rows) == 1:
            return rows[0]
        packed = torch.empty(width, dtype=dtype, device=x.device)
        block, grid = _merge_shape(len(rows), x.shape[1])
        _launch(
            reductions.combine_moments_kernel, grid, rows, packed, len(rows), x.shape[1], *block
        )
        return packed

    def merge(self, packed: Tensor, eps: float) -> Statistics:
        """What W ranks' moments come down to, in one launch."""
        packed = packed.contiguous()
        num_rows, num_channels = packed.shape[0], packed.shape[1] // 2 - 1
        total = torch.empty((), dtype=torch.float64, device=packed.device)
        statistics = [packed.new_empty(num_channels) for _ in ("mean", "var", "invstd")]
        block, grid = _merge_shape(num_rows, num_channels)
        _launch(
            per_channel.merge_kernel,
            grid,
            packed,
            total,
            *statistics,
            *_split(eps),
            num_rows,
            num_channels,
            *block,
        )
        return Statistics(total, *statistics)

    def update(self, running: Running, statistics: Statistics) -> None:
        """Move the running statistics, in one launch; strided ones are left to ATen."""
        if not (running.mean.is_contiguous() and running.var.is_contiguous()):
            _EAGER.update(running, statistics)
            return
        cumulative = running.momentum is None
        assert not cumulative or running.num_batches_tracked is not None, (
            "momentum=None needs num_batches_tracked"
        )
        num_channels = running.mean.numel()
        _launch(
            per_channel.update_kernel,
            (1, 1),
            running.mean,
            running.var,
            running.num_batches_tracked,
            statistics.total,
            statistics.mean,
            statistics.var,
            *_split(running.momentum or 0.0),
            num_channels,
            cumulative,
            min(VALUES_AT_ONCE, triton.next_power_of_2(num_channels)),
        )
        # what autograd saved of them is stale now, as after any operation in place
        torch.autograd.graph.increment_version(t for t in running[:3] if t is not None)

    def normalize(self, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual)."""
        x = _dense(x)
        y = torch.empty_like(x)
        operands = (x, *_contiguous(affine), _like(fused.residual, x), _bytes(fused.mask))
        return _map(maps.normalize_kernel, x, operands, y, fused.act)

    def backward_sums(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """Sum of dz, and sum of dz * xhat, per channel."""
        dtype, num_channels = affine.mean.dtype, x.shape[1]
        if x.numel() == 0:
            return torch.zeros((2, num_channels), dtype=dtype, device=x.device)
        x = _dense(x)
        tiling = tiling_of(x)
        rows = _table(tiling.grid[1], 2 * num_channels, dtype, x.device)
        operands = _backward_operands(dy, x, affine, fused)
        code = _code(fused.act)
        _launch(
            reductions.backward_sums_kernel, tiling.grid, *operands, rows, *tiling.arguments, code
        )
        if len(rows) == 1:
            return rows.view(2, num_channels)
        sums = torch.empty((2, num_channels), dtype=dtype, device=x.device)
        block, grid = _merge_shape(len(rows), 2 * num_channels)
        _launch(reductions.add_rows_kernel, grid, rows, sums, len(rows), 2 * num_channels, *block)
        return sums

    def backward_input(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, sums: Tensor, total: Tensor
    ) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat)."""
        x = _dense(x)
        operands = (*_backward_operands(dy, x, affine, fused), sums.contiguous(), total)
        return _map(maps.backward_input_kernel, x, operands, torch.empty_like(x), fused.act)

    def backward_residual(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """The gradient of the residual; `dy` itself where nothing stands between."""
        if fused.act is None and fused.mask is None:
            return dy
        x = _dense(x)
        operands = _backward_operands(dy, x, affine, fused)
        dz = torch.empty_like(x, dtype=dy.dtype)
        return _map(maps.backward_residual_kernel, x, operands, dz, fused.act)


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any) -> None:
    """Launch on the device of the first argument; Triton takes the current one.

    Without fused multiply-adds, backward computes the very z that forward computed, whatever else its kernel does, so
    that both see the same side of a kink; these kernels wait for memory, not for arithmetic.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, enable_fp_fusion=False)


def _map(
    kernel: Any, x: Tensor, operands: tuple[Tensor | None, ...], result: Tensor, act: str | None
) -> Tensor:
    """`result`, filled by a kernel that takes operands, the result, a tiling and an activation's code."""
    if x.numel() > 0:
        tiling = tiling_of(x)
        _launch(kernel, tiling.grid, *operands, result, *tiling.arguments, _code(act))
    return result


def _backward_operands(
    dy: Tensor, x: Tensor, affine: Affine, fused: Fused
) -> tuple[Tensor | None, ...]:
    residual, output = _like(fused.residual, x), _like(fused.output, x)
    return _like(dy, x), x, *_contiguous(affine), residual, _bytes(fused.mask), output


def _dense(x: Tensor) -> Tensor:
    """`x` in a memory format that the kernels read, usually itself."""
    return x.contiguous(memory_format=memory_format(x))


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """`tensor`, of the shape of `x`, in the memory format of `x`."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format(x))


def _contiguous(affine: Affine) -> Iterable[Tensor | None]:
    return (None if values is None else values.contiguous() for values in affine)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _code(act: str | None) -> int:
    return 0 if act is None else ACTIVATIONS[act].code


def _table(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a row a program: in float64 where rows are yet to be combined."""
    row_dtype = dtype if num_rows == 1 else torch.float64
    return torch.empty((num_rows, width), dtype=row_dtype, device=device)


def _merge_shape(num_rows: int, num_channels: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and channels that a program merges at once, and the grid."""
    rows = min(ROWS_AT_ONCE, triton.next_power_of_2(num_rows))
    channels = min(64, VALUES_AT_ONCE // rows, triton.next_power_of_2(num_channels))
    return (rows, channels), (triton.cdiv(num_channels, channels), 1)


def _split(value: float) -> tuple[float, float]:
    """`value` as a float32 and what that leaves over."""
    high = ctypes.c_float(value).value
    return high, value - high
