# pyright: reportArgumentType=false, reportAssignmentType=false
"""Elementwise kernels in Triton: normalise forward, the gradient of the input backward.

Programs walk their steps backwards, because what a reduction read last is still in the L2 cache. Values read for the
last time in a pass are marked evict_first.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.activations import activate, has_unit_slope, slope, slope_from_bits
from syncbn.norm.backends.triton.tiles import (
    SIZES,
    Coefficients,
    Program,
    Tile,
    coefficient,
    coefficients,
    load_bits,
    load_tile,
    store_bits,
    store_tile,
    this_program,
    tile_of,
)


@triton.jit
def load_dz(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    given: Coefficients,
    residual_ptr: tl.tensor | None,
    output_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    program: Program,
    tile: Tile,
    SHAPE: tl.constexpr,
    LAST_USE: tl.constexpr,
    ACT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The gradient of z, dz = dy * act'(z), and x - mean; z as forward computed it, or from the saved y or bits."""
    dtype: tl.constexpr = given.mean.dtype
    dy = load_tile(dy_ptr, tile, dtype, LAST_USE)
    centred = load_tile(x_ptr, tile, dtype, LAST_USE) - given.mean
    if ACT == 0:
        dz = dy
    elif bits_ptr is not None:
        dz = dy * slope_from_bits(load_bits(bits_ptr, program, tile, SHAPE), dtype, ACT)
    else:
        if output_ptr is not None:
            z = load_tile(output_ptr, tile, dtype, False)
        else:
            z = centred * given.scale + given.bias
            if residual_ptr is not None:
                z += load_tile(residual_ptr, tile, dtype, False)
        dz = dy * slope(z, ACT)
    return dz, centred


@triton.jit(do_not_specialize=SIZES)
def normalize_kernel(
    x_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    residual_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    y_ptr: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    SHAPE: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """Y = act((x - mean) * invstd * weight + bias + residual); the mean goes first, so that a large one cancels."""
    program = this_program(C, S, steps, steps_per_program, SHAPE)
    given = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, program)
    normalize_steps(x_ptr, given, residual_ptr, mask_ptr, bits_ptr, y_ptr, program, SHAPE, ACT)


@triton.jit
def normalize_steps(
    x_ptr: tl.tensor,
    given: Coefficients,
    residual_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    y_ptr: tl.tensor,
    program: Program,
    SHAPE: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """A program's steps of y, the last one first."""
    dtype: tl.constexpr = given.mean.dtype
    for done in range(program.last - program.first):
        tile = tile_of(program.last - 1 - done, program, mask_ptr, SHAPE)
        z = (load_tile(x_ptr, tile, dtype, True) - given.mean) * given.scale + given.bias
        if residual_ptr is not None:
            z += load_tile(residual_ptr, tile, dtype, True)
        if bits_ptr is not None:
            store_bits(bits_ptr, has_unit_slope(z, ACT), program, tile, SHAPE)
        store_tile(y_ptr, tile, tl.where(tile.live, activate(z, ACT), 0.0))


@triton.jit(do_not_specialize=SIZES)
def finish_backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    residual_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    output_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    sums_ptr: tl.tensor,
    total_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    SHAPE: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """Dx = weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat), the means from the sums of W ranks."""
    program = this_program(C, S, steps, steps_per_program, SHAPE)
    C = program.C
    given = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, program)
    dtype: tl.constexpr = given.mean.dtype
    total = tl.maximum(tl.load(total_ptr), 1.0).to(dtype)
    sum_dz = coefficient(sums_ptr, program, 0.0, dtype)
    sum_dz_xhat = coefficient(sums_ptr + C, program, 0.0, dtype)
    for rank in range(1, W):
        sum_dz += coefficient(sums_ptr + rank * 2 * C, program, 0.0, dtype)
        sum_dz_xhat += coefficient(sums_ptr + rank * 2 * C + C, program, 0.0, dtype)
    mean_dz, xhat_factor = sum_dz / total, sum_dz_xhat / total * given.invstd
    for done in range(program.last - program.first):
        tile = tile_of(program.last - 1 - done, program, mask_ptr, SHAPE)
        dz, centred = load_dz(
            dy_ptr,
            x_ptr,
            given,
            residual_ptr,
            output_ptr,
            bits_ptr,
            program,
            tile,
            SHAPE,
            True,
            ACT,
        )
        dx = tl.where(tile.live, (dz - mean_dz - centred * xhat_factor) * given.scale, 0.0)
        store_tile(dx_ptr, tile, dx)
