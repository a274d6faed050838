# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false, reportOperatorIssue=false
"""Reductions over an input in Triton: moments forward, gradient sums backward.

Each program reduces its share of the positions to one row of a table, and a second small kernel merges or adds the rows
in a fixed order, in float64: no atomics, so the same input gives the same bits. Where one program serves a channel, its
row is the result.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.elementwise import load_dz
from syncbn.norm.backends.triton.statistics import merged, store_packed
from syncbn.norm.backends.triton.tiles import (
    SIZES,
    Program,
    coefficients,
    load_tile,
    program_channels,
    store_tile,
    this_program,
    tile_of,
)

POOR = tl.constexpr(16.0)
"""Largest squared distance of a shift from the mean, in variances: M2 is then off by 17 roundings."""
UNROLL = tl.constexpr(2)
"""Tiles loaded at once: on an H100 2 to 4 % faster than one by one, where registers allow it."""


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x_ptr: tl.tensor,
    mask_ptr: tl.tensor | None,
    rows_ptr: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    SHAPE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """One row of packed moments a program: sums of deviations from a shift, and of their squares.

    The shift is the mean of the program's first tile. Where that is far from the mean, because the tile holds few
    values or unlike ones, the program reads its steps again with the mean that it found as the shift.
    """
    program = this_program(C, S, steps, steps_per_program, SHAPE)
    shift = tl.zeros(program.channel.shape, DTYPE)
    count, shift, offset, M2 = _deviations(x_ptr, mask_ptr, shift, True, program, SHAPE, DTYPE)
    poor = offset * offset * count.to(DTYPE) > POOR * M2
    if tl.sum((poor & program.valid).to(tl.int32), 0) > 0:
        _, shift, offset, M2 = _deviations(
            x_ptr, mask_ptr, shift + offset, False, program, SHAPE, DTYPE
        )
    mean = shift.to(tl.float64) + offset.to(tl.float64)
    row_ptr = rows_ptr + tl.program_id(1) * (2 + 2 * program.C)
    store_packed(row_ptr, count, mean, M2, program.channel, program.valid, program.C)


@triton.jit
def _deviations(
    x_ptr: tl.tensor,
    mask_ptr: tl.tensor | None,
    shift: tl.tensor,
    FIND: tl.constexpr,
    program: Program,
    SHAPE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The count of a program's steps, the shift, and per channel the mean's distance from the shift, and M2.

    FIND takes the mean of the first tile that holds a value as the shift. There is one sum for each place in a tile,
    and they are added across threads once, at the end.
    """
    count = tl.full((), 0, tl.int64)
    sums = tl.zeros(program.offsets.shape, DTYPE)
    squares = tl.zeros(program.offsets.shape, DTYPE)
    for step in tl.range(program.first, program.last, loop_unroll_factor=UNROLL):
        tile = tile_of(step, program, mask_ptr, SHAPE)
        x = load_tile(x_ptr, tile, DTYPE, False)
        keep = tile.keep.to(tl.int32)
        new = tl.minimum(tile.remaining, SHAPE.P) if mask_ptr is None else tl.sum(keep, 0)
        if FIND:  # noqa: SIM102
            if count == 0:
                shift = tl.sum(x, 1) / tl.maximum(new, 1).to(DTYPE)
        deviation = tl.where(tile.live, x - shift[:, None], 0.0)
        sums += deviation
        squares += deviation * deviation
        count += new.to(tl.int64)
    total = tl.sum(sums, 1)
    offset = total / tl.maximum(count, 1).to(DTYPE)
    M2 = tl.sum(squares, 1) - total * offset
    return count, shift, offset, tl.where(M2 < 0, 0.0, M2)  # NaN stays


@triton.jit(do_not_specialize=SIZES)
def grad_sums_kernel(
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
    dz_ptr: tl.tensor | None,
    rows_ptr: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    SHAPE: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """One row a program: C sums of dz, then C sums of dz * xhat; and dz itself, unless `dz_ptr` is None.

    Masked values are loaded as 0 and add 0.
    """
    program = this_program(C, S, steps, steps_per_program, SHAPE)
    given = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, program)
    sum_dz = tl.zeros(program.offsets.shape, given.mean.dtype)
    sum_dz_centred = tl.zeros(program.offsets.shape, given.mean.dtype)
    # a residual's bits and gradient need the registers
    TILES: tl.constexpr = UNROLL if ACT == 0 else 1
    for step in tl.range(program.first, program.last, loop_unroll_factor=TILES):
        tile = tile_of(step, program, mask_ptr, SHAPE)
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
            False,
            ACT,
        )
        sum_dz += dz
        sum_dz_centred += dz * centred
        if dz_ptr is not None:
            store_tile(dz_ptr, tile, dz)
    row_ptr = rows_ptr + tl.program_id(1) * 2 * program.C + program.channel
    tl.store(row_ptr, tl.sum(sum_dz, 1), mask=program.valid)
    sum_dz_xhat = tl.sum(sum_dz_centred, 1) * tl.sum(given.invstd, 1)
    tl.store(row_ptr + program.C, sum_dz_xhat, mask=program.valid)


@triton.jit(do_not_specialize=SIZES)
def combine_moments_kernel(
    rows_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    ONCE: tl.constexpr,
) -> None:
    """Packed moments of the union of W rows."""
    channel, valid = program_channels(C, K)
    total, mean, M2 = merged(rows_ptr, W, C, ROWS, K, ONCE)
    store_packed(packed_ptr, total.to(tl.int64), mean, M2, channel, valid, C)


@triton.jit(do_not_specialize=SIZES)
def add_rows_kernel(
    rows_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """The sum of W rows of C values."""
    channel, valid = program_channels(C, K)
    sums = tl.zeros((K,), tl.float64)
    for start in range(0, W, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < W)[:, None] & valid[None, :]
        sums += tl.sum(
            tl.load(rows_ptr + row[:, None] * C + channel[None, :], mask=live, other=0), 0
        )
    tl.store(sums_ptr + channel, sums, mask=valid)
