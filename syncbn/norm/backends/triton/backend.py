"""The Triton backend, for CUDA tensors; with `TRITON_INTERPRET=1` it runs on CPU tensors, slowly.

* Each pass over an input reads it once, and nothing waits for the device: a step can be captured in a CUDA graph.
* Below a few million values the host's time for launches and allocations is the layer's time. So a pass is one
  reduction (two launches where programs share a channel), the exchange, and one kernel for all that follows it.
* Beside a residual, forward keeps one bit a value in place of the output; see `derivative_bits`.

Only code that serves a CUDA tensor imports this module, so that the layer works without Triton.
"""

import ctypes
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.norm.backends import aten
from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.base import (
    Backend,
    NormArgs,
    Running,
    check_statistics,
    kernels_may_read,
    kernels_may_write,
)
from syncbn.norm.backends.triton import derivative_bits, elementwise, reductions, statistics
from syncbn.norm.backends.triton.launch import launch
from syncbn.norm.backends.triton.tile_plan import Geometry, geometry_of
from syncbn.norm.moments import Statistics, Stats, stats_dtype

WARPS = 4
"""Of a program that merges or adds rows, or updates running statistics."""

ROWS_AT_ONCE = 1024
"""Rows that a merge holds in registers, and the most programs that share a channel; further rows follow in turns."""

RANKS_AT_ONCE = 16
"""The same for a kernel that normalises too, which needs the registers."""

VALUES_AT_ONCE = 2048
"""Values, over rows and channels, that a merge or an update holds in registers."""

_ATEN = aten.AtenBackend()


class TritonBackend(Backend):
    """`Backend` in Triton."""

    def for_pass(self, args: NormArgs) -> Backend:
        """ATen where an operand is not what kernels can read."""
        return self if kernels_may_read(*args[:4]) else _ATEN

    def local_stats(self, args: NormArgs) -> Tensor:
        """Count, mean and M2 per channel, in one pass and one more launch where programs share a channel."""
        x, num_channels, dtype = args.x, args.x.shape[1], stats_dtype(args.x.dtype)
        width = 2 + 2 * num_channels
        geometry = geometry_of(x)
        x, plan = _dense(x, geometry), geometry.reduction
        packed = torch.empty(width, dtype=dtype, device=x.device)
        num_rows, rows = plan.grid[1], packed
        if num_rows > 1:
            rows = torch.empty(num_rows * width, dtype=torch.float64, device=x.device)
        kind = tl.float64 if dtype == torch.float64 else tl.float32
        statics = (plan.shape, kind, plan.num_warps)
        tensors = (x, _as_bytes(args.mask), rows)
        launch(reductions.moments_kernel, plan.grid, tensors, plan.sizes, statics)
        if num_rows > 1:
            block, grid = _merge_plan(num_rows, num_channels)
            sizes = (num_rows, num_channels)
            launch(reductions.combine_moments_kernel, grid, (rows, packed), sizes, block)
        return packed

    def normalize(self, args: NormArgs, stats: Stats) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual); x is read once."""
        geometry = geometry_of(args.x)
        x, plan = _dense(args.x, geometry), geometry.elementwise
        y = torch.empty_like(x)
        tensors = (x, *_coefficients(args, stats), *_forward_operands(args, geometry), y)
        statics = (plan.shape, _code(args.act), plan.num_warps)
        launch(elementwise.normalize_kernel, plan.grid, tensors, plan.sizes, statics)
        return y

    def finish_forward(self, args: NormArgs, gathered: Tensor) -> tuple[Tensor, Stats]:
        """Merge, update and normalise in one launch, where there is certainly enough to normalise with.

        A mask, or few values here, may leave one value per channel, which is known only after the merge: the update is
        then a launch of its own, to the same bits.
        """
        running, enough = args.running, args.mask is None and args.x.numel() > args.x.shape[1]
        moved = None
        if enough and running is not None and kernels_may_write(running):
            # momentum=None weighs by a count that other programs must not read before it is stored
            moved = None if running.momentum is None else running
        geometry = geometry_of(args.x)
        x, plan, gathered = _dense(args.x, geometry), geometry.elementwise, gathered.contiguous()
        y, total = torch.empty_like(x), torch.empty((), dtype=torch.float64, device=x.device)
        stats = Statistics(total, *(gathered.new_empty(x.shape[1]) for _ in range(3)))
        buffers, momentum = ((None,) * 3, 0.0) if moved is None else (moved[:3], moved[3])
        affine = (_contiguous_or_none(args.weight), _contiguous_or_none(args.bias))
        tensors = (gathered, *stats, *buffers, x, *affine, *_forward_operands(args, geometry), y)
        numbers = (*_split(args.eps), *_split(momentum or 0.0), len(gathered), *plan.sizes)
        at_once = min(RANKS_AT_ONCE, triton.next_power_of_2(len(gathered)))
        once = at_once >= len(gathered)
        statics = (plan.shape, _code(args.act), at_once, once, plan.num_warps)
        launch(statistics.finish_forward_kernel, plan.grid, tensors, numbers, statics)
        if moved is not None:
            increment_version([t for t in moved[:3] if t is not None])
        if not enough:
            check_statistics(gathered, stats, args)
        if running is not None and moved is None:
            _update(running, stats)
        return y, stats

    def local_grad_sums(
        self, dy: Tensor, args: NormArgs, stats: Stats, needs_dz: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of dz, and sum of dz * xhat, per channel, and dz in the same launch."""
        x, num_channels, dtype = args.x, args.x.shape[1], stats_dtype(args.x.dtype)
        geometry = geometry_of(x)
        x, plan = _dense(x, geometry), geometry.reduction
        dz = torch.empty_like(x, dtype=dy.dtype) if needs_dz and _alters_gradient(args) else None
        sums = torch.empty((2, num_channels), dtype=dtype, device=x.device)
        num_rows = plan.grid[1]
        rows = sums if num_rows == 1 else sums.new_empty(num_rows * 2 * num_channels)
        tensors = (*_backward_operands(dy, x, args, stats, geometry), dz, rows)
        statics = (plan.shape, _code(args.act), plan.num_warps)
        launch(reductions.grad_sums_kernel, plan.grid, tensors, plan.sizes, statics)
        if num_rows > 1:
            (*at_once, _, warps), grid = _merge_plan(num_rows, 2 * num_channels)
            sizes = (num_rows, 2 * num_channels)
            launch(reductions.add_rows_kernel, grid, (rows, sums), sizes, (*at_once, warps))
        if needs_dz and dz is None:
            dz = dy
        return sums, dz

    def finish_backward(self, dy: Tensor, args: NormArgs, stats: Stats, gathered: Tensor) -> Tensor:
        """Weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat), the ranks' sums added in the same launch."""
        geometry = geometry_of(args.x)
        x, plan = _dense(args.x, geometry), geometry.elementwise
        dx = torch.empty_like(x)
        operands = _backward_operands(dy, x, args, stats, geometry)
        tensors = (*operands, gathered.contiguous(), stats.total, dx)
        numbers = (len(gathered), *plan.sizes)
        statics = (plan.shape, _code(args.act), plan.num_warps)
        launch(elementwise.finish_backward_kernel, plan.grid, tensors, numbers, statics)
        return dx

    def grad_residual(self, dy: Tensor, args: NormArgs, stats: Stats) -> Tensor:
        """The gradient of the residual; a reduction gives it, as few passes need nothing else."""
        if not _alters_gradient(args):
            return dy
        _, dz = self.local_grad_sums(dy, args, stats, needs_dz=True)
        assert dz is not None
        return dz

    def empty_bits(self, args: NormArgs) -> Tensor | None:
        """Memory for `args.bits`, where act' takes two values and is known from y."""
        act = args.act
        if act is None or not ACTIVATIONS[act].from_output or args.x.numel() == 0:
            return None
        return derivative_bits.empty_bits(args.x)


def _update(running: Running, stats: Stats) -> None:
    """Move the running statistics, in one launch; strided ones are left to ATen."""
    if not kernels_may_write(running):
        aten.update(running, stats)
        return
    cumulative = running.momentum is None
    assert not cumulative or running.num_batches_tracked is not None
    num_channels = running.mean.numel()
    at_once = min(VALUES_AT_ONCE, triton.next_power_of_2(num_channels))
    tensors = (*running[:3], stats.total, stats.mean, stats.var)
    numbers = (*_split(running.momentum or 0.0), num_channels)
    launch(statistics.update_kernel, (1, 1), tensors, numbers, (cumulative, at_once, WARPS))
    increment_version([t for t in running[:3] if t is not None])


def _alters_gradient(args: NormArgs) -> bool:
    """Whether dz differs from dy."""
    return args.act is not None or args.mask is not None


def _forward_operands(args: NormArgs, geometry: Geometry) -> tuple[Tensor | None, ...]:
    return _like(args.residual, geometry), _as_bytes(args.mask), args.bits


def _backward_operands(
    dy: Tensor, x: Tensor, args: NormArgs, stats: Stats, geometry: Geometry
) -> tuple[Tensor | None, ...]:
    residual, output = _like(args.residual, geometry), _like(args.output, geometry)
    operands = (_like(dy, geometry), x, *_coefficients(args, stats), residual)
    return *operands, _as_bytes(args.mask), output, args.bits


def _coefficients(args: NormArgs, stats: Stats) -> tuple[Tensor | None, ...]:
    coefficients = (stats.mean, stats.invstd, args.weight, args.bias)
    return tuple(map(_contiguous_or_none, coefficients))


def _dense(x: Tensor, geometry: Geometry) -> Tensor:
    """`x` as the kernels read it, usually itself."""
    return x if geometry.dense else x.contiguous(memory_format=geometry.memory_format)


def _like(values: Tensor | None, geometry: Geometry) -> Tensor | None:
    """`values`, of the shape of x, in the order in which x is read."""
    if values is None or values.stride() == geometry.stride:
        return values
    return values.contiguous(memory_format=geometry.memory_format)


def _contiguous_or_none(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _code(act: str | None) -> int:
    return 0 if act is None else ACTIVATIONS[act].code


@functools.lru_cache(maxsize=4096)
def _merge_plan(
    num_rows: int, num_channels: int
) -> tuple[tuple[int, int, bool, int], tuple[int, int]]:
    """Statics of programs that merge rows (rows and channels at once, whether rows are all, warps), and their grid."""
    rows = min(ROWS_AT_ONCE, triton.next_power_of_2(num_rows))
    channels = min(64, VALUES_AT_ONCE // rows, triton.next_power_of_2(num_channels))
    return (rows, channels, rows >= num_rows, WARPS), (triton.cdiv(num_channels, channels), 1)


@functools.lru_cache(maxsize=1024)
def _split(value: float) -> tuple[float, float]:
    """`value` as a float32, and its remainder."""
    high = ctypes.c_float(value).value
    return high, value - high
