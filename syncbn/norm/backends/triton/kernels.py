"""The kernels in Triton, for CUDA tensors: each reads its input once, and nothing waits for the device.

A layer is two or three launches each way (moments, combined where programs shared a channel, then all that follows
the exchange; two sums, likewise, then the gradient), each between a few plain allocations: what runs can be captured
in a CUDA graph, and this file is thin because below a few million values the host's time is the layer's time. Only
code that has met a CUDA tensor imports it, so the layer works without Triton.
"""

import ctypes
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.aten import EagerKernels, stats_dtype
from syncbn.norm.backends.bits import room
from syncbn.norm.backends.operands import Affine, Fused, Running
from syncbn.norm.backends.triton import maps, reductions
from syncbn.norm.backends.triton import rows as rows_of
from syncbn.norm.backends.triton import statistics as per_channel
from syncbn.norm.backends.triton.launch import launch
from syncbn.norm.backends.triton.tile_plan import Form, Tiling, form_of
from syncbn.norm.moments import Statistics

WARPS = 4
"""Of a program that moves running statistics, or merges rows."""

ROWS_AT_ONCE = 1024
"""Rows that a merge holds in registers; more come in turns. Programs that share a channel are no more than that."""

VALUES_AT_ONCE = 2048
"""Values, over rows and channels, that a merge or an update holds in registers."""

_EAGER = EagerKernels()


class TritonKernels:
    """`Kernels` in Triton; with `TRITON_INTERPRET=1` they run on CPU tensors, slowly."""

    launched = True

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Packed moments in one pass over `x`, one more launch where several programs share a channel."""
        dtype, width = stats_dtype(x.dtype), 2 + 2 * x.shape[1]
        if x.numel() == 0:
            return torch.zeros(width, dtype=dtype, device=x.device)
        form = form_of(x)
        x, tiling = _dense(x, form), form.reduction
        packed = torch.empty(width, dtype=dtype, device=x.device)
        num_rows, rows = tiling.grid[1], packed
        if num_rows > 1:
            rows = torch.empty(num_rows * width, dtype=torch.float64, device=x.device)
        kind = tl.float64 if dtype == torch.float64 else tl.float32
        statics = (*tiling.shape, kind, tiling.num_warps)
        tensors = (x, _bytes(mask), rows)
        launch(reductions.moments_kernel, tiling.grid, tensors, tiling.sizes, statics)
        if num_rows > 1:
            block, grid = _merge_shape(num_rows, x.shape[1])
            sizes = (num_rows, x.shape[1])
            launch(rows_of.combine_moments_kernel, grid, (rows, packed), sizes, block)
        return packed

    def merge(self, packed: Tensor, eps: float) -> Statistics:
        """What W ranks' moments come down to, in one launch."""
        packed = packed.contiguous()
        num_rows, num_channels = packed.shape[0], packed.shape[1] // 2 - 1
        statistics = _statistics(num_channels, packed)
        block, grid = _merge_shape(num_rows, num_channels)
        numbers = (*_split(eps), num_rows, num_channels)
        launch(per_channel.merge_kernel, grid, (packed, *statistics), numbers, block)
        return statistics

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
        at_once = min(VALUES_AT_ONCE, triton.next_power_of_2(num_channels))
        launch(
            per_channel.update_kernel,
            (1, 1),
            (*running[:3], *statistics[:3]),
            (*_split(running.momentum or 0.0), num_channels),
            (cumulative, at_once, WARPS),
        )
        _written(running)

    def room_for_bits(self, x: Tensor, act: str | None) -> Tensor | None:
        """Where `normalize` may note the side of its kink that each value of z is on; None where it keeps no bits.

        They spare backward the reading of y, and nobody keeps y for its sake; see `bits`.
        """
        if act is None or not ACTIVATIONS[act].from_output or x.numel() == 0:
            return None
        return room(x)

    def normalize(self, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual)."""
        if x.numel() == 0:
            return torch.empty_like(x)
        form = form_of(x)
        x = _dense(x, form)
        residual = _like(fused.residual, form)
        operands = (x, *_affine(affine), residual, _bytes(fused.mask), fused.bits)
        return _map(maps.normalize_kernel, operands, torch.empty_like(x), form.map, fused.act)

    def finish(
        self,
        x: Tensor,
        packed: Tensor,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        fused: Fused,
        running: Running | None,
    ) -> tuple[Tensor, Statistics]:
        """`merge`, `update` and `normalize` in one launch, to the same bits; `x` is not empty."""
        form = form_of(x)
        x, tiling, packed = _dense(x, form), form.map, packed.contiguous()
        num_rows, num_channels = packed.shape[0], x.shape[1]
        y, statistics = torch.empty_like(x), _statistics(num_channels, packed)
        here = running if running is not None and _moves_here(running) else None
        tensors = (
            packed,
            *statistics,
            *((None, None, None) if here is None else here[:3]),
            x,
            _plain(weight),
            _plain(bias),
            _like(fused.residual, form),
            _bytes(fused.mask),
            fused.bits,
            y,
        )
        momentum = 0.0 if here is None or here.momentum is None else here.momentum
        numbers = (*_split(eps), *_split(momentum), num_rows, *tiling.sizes)
        at_once = min(16, triton.next_power_of_2(num_rows))
        merging = (at_once, at_once >= num_rows)
        statics = (*tiling.shape, _code(fused.act), *merging, tiling.num_warps)
        launch(per_channel.finish_kernel, tiling.grid, tensors, numbers, statics)
        if here is not None:
            _written(here)
        elif running is not None:
            self.update(running, statistics)
        return y, statistics

    def dense(self, x: Tensor) -> Tensor:
        """`x` as the kernels read it, usually itself."""
        return _dense(x, form_of(x))

    def backward_sums(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, dz: Tensor | None = None
    ) -> Tensor:
        """Sum of dz, and sum of dz * xhat, per channel; and dz, where it is given, with the strides of `dense(x)`."""
        dtype, num_channels = affine.mean.dtype, x.shape[1]
        if x.numel() == 0:
            return torch.zeros((2, num_channels), dtype=dtype, device=x.device)
        form = form_of(x)
        x, tiling = _dense(x, form), form.reduction
        sums = torch.empty((2, num_channels), dtype=dtype, device=x.device)
        num_rows = tiling.grid[1]
        rows = sums if num_rows == 1 else sums.new_empty(num_rows * 2 * num_channels)
        tensors = (*_backward_operands(dy, x, affine, fused, form), dz, rows)
        statics = (*tiling.shape, _code(fused.act), tiling.num_warps)
        launch(reductions.backward_sums_kernel, tiling.grid, tensors, tiling.sizes, statics)
        if num_rows > 1:
            (*at_once, _, warps), grid = _merge_shape(num_rows, 2 * num_channels)
            sizes = (num_rows, 2 * num_channels)
            launch(rows_of.add_rows_kernel, grid, (rows, sums), sizes, (*at_once, warps))
        return sums

    def backward_input(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, sums: Tensor, total: Tensor
    ) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat); `sums` may be W ranks' own, `(W, 2C)`."""
        if x.numel() == 0:
            return torch.empty_like(x)
        form = form_of(x)
        x, ranks = _dense(x, form), sums.numel() // (2 * x.shape[1])
        operands = (*_backward_operands(dy, x, affine, fused, form), _plain(sums), total)
        dx = torch.empty_like(x)
        return _map(maps.backward_input_kernel, operands, dx, form.map, fused.act, ranks)

    def backward_residual(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """The gradient of the residual; `dy` itself where nothing stands between."""
        if fused.act is None and fused.mask is None:
            return dy
        if x.numel() == 0:
            return torch.empty_like(x, dtype=dy.dtype)
        form = form_of(x)
        x = _dense(x, form)
        operands = _backward_operands(dy, x, affine, fused, form)
        dz = torch.empty_like(x, dtype=dy.dtype)
        return _map(maps.backward_residual_kernel, operands, dz, form.map, fused.act)


def _map(
    kernel: Any,
    operands: tuple[Tensor | None, ...],
    result: Tensor,
    tiling: Tiling,
    act: str | None,
    *numbers: int,
) -> Tensor:
    """`result`, filled by a kernel that takes operands, the result, numbers, a tiling and an activation's code."""
    statics = (*tiling.shape, _code(act), tiling.num_warps)
    launch(kernel, tiling.grid, (*operands, result), (*numbers, *tiling.sizes), statics)
    return result


def _statistics(num_channels: int, like: Tensor) -> Statistics:
    """Room for them, where `like` is."""
    total = torch.empty((), dtype=torch.float64, device=like.device)
    return Statistics(total, *(like.new_empty(num_channels) for _ in ("mean", "var", "invstd")))


def _moves_here(running: Running) -> bool:
    """Whether every program may move its own channels: their weight is known, and they lie side by side."""
    contiguous = running.mean.is_contiguous() and running.var.is_contiguous()
    return contiguous and running.momentum is not None


def _written(running: Running) -> None:
    """What autograd saved of running statistics is stale now, as after any operation in place."""
    torch.autograd.graph.increment_version(t for t in running[:3] if t is not None)


def _backward_operands(
    dy: Tensor, x: Tensor, affine: Affine, fused: Fused, form: Form
) -> tuple[Tensor | None, ...]:
    residual, output = _like(fused.residual, form), _like(fused.output, form)
    operands = (_like(dy, form), x, *_affine(affine), residual)
    return *operands, _bytes(fused.mask), output, fused.bits


def _dense(x: Tensor, form: Form) -> Tensor:
    """`x` in a memory format that the kernels read, usually itself."""
    return x if form.dense else x.contiguous(memory_format=form.memory_format)


def _like(tensor: Tensor | None, form: Form) -> Tensor | None:
    """`tensor`, of the shape of x, as x is read."""
    if tensor is None or tensor.stride() == form.stride:
        return tensor
    return tensor.contiguous(memory_format=form.memory_format)


def _plain(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.is_contiguous() else values.contiguous()


def _affine(affine: Affine) -> tuple[Tensor | None, ...]:
    mean, invstd, weight, bias = affine
    return _plain(mean), _plain(invstd), _plain(weight), _plain(bias)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _code(act: str | None) -> int:
    return 0 if act is None else ACTIVATIONS[act].code


@functools.lru_cache(maxsize=4096)
def _merge_shape(
    num_rows: int, num_channels: int
) -> tuple[tuple[int, int, bool, int], tuple[int, int]]:
    """Of programs that merge rows: rows and channels at once, whether that is all, and warps; and their grid."""
    rows = min(ROWS_AT_ONCE, triton.next_power_of_2(num_rows))
    channels = min(64, VALUES_AT_ONCE // rows, triton.next_power_of_2(num_channels))
    return (rows, channels, rows >= num_rows, WARPS), (triton.cdiv(num_channels, channels), 1)


@functools.lru_cache(maxsize=1024)
def _split(value: float) -> tuple[float, float]:
    """`value` as a float32 and what that leaves over."""
    high = ctypes.c_float(value).value
    return high, value - high
