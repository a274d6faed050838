# pyright: reportArgumentType=false
"""Reductions over an input in Triton: moments forward, two sums backward.

Each program brings its share of the positions down to one row of a table, and a second small kernel
adds or merges the rows in a fixed order, in float64: no atomics, so the same input gives the same bits. Where
one program serves a channel, its row is the result.
"""

import triton
import triton.language as tl

from syncbn.norm.kernels.triton_maps import before_act
from syncbn.norm.kernels.triton_tiles import (
    SIZES,
    aligned,
    coefficients,
    kept,
    load_tile,
    locate,
    own_channels,
    own_steps,
    tile_offsets,
)

LOW_BITS = tl.constexpr(2**20)


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x_ptr: tl.tensor,
    mask_ptr: tl.tensor | None,
    rows_ptr: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """One row of packed moments a program. A tile stays in registers: first its mean, then squared deviations from it.

    Tiles are merged by the pairwise formula of Chan, Golub & LeVeque (1983), counted from the first value of the
    channel, so that a mean far from zero costs no digits.
    """
    C, S = aligned(C, S, VECTOR, CHANNELS_LAST)
    first, last = own_steps(steps, steps_per_program)
    channel, known = own_channels(C, K)
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    shift = _first_values(x_ptr, mask_ptr, first, C, S, K, P, CHANNELS_LAST).to(DTYPE)
    count = tl.full((), 0, tl.int64)
    mean = tl.zeros((K,), DTYPE)
    M2 = tl.zeros((K,), DTYPE)
    for step in range(first, last):
        origin, place, room = locate(step, C, S, K, P, CHANNELS_LAST)
        keep = kept(mask_ptr, place, room, P)
        live = known[:, None] & keep[None, :]
        x = load_tile(x_ptr + origin, offsets, live, DTYPE, False)
        new = tl.sum(keep.to(tl.int32), 0).to(tl.int64)
        deviation = tl.where(live, x - shift[:, None], 0.0)
        tile_mean = tl.sum(deviation, 1) / tl.maximum(new, 1).to(DTYPE)
        deviation = tl.where(live, deviation - tile_mean[:, None], 0.0)
        between = tile_mean - mean
        share = new.to(DTYPE) / tl.maximum(count + new, 1).to(DTYPE)
        M2 += tl.sum(deviation * deviation, 1) + between * between * share * count.to(DTYPE)
        mean += between * share
        count += new
    mean_of_x = shift.to(tl.float64) + mean.to(tl.float64)
    _store_packed(
        rows_ptr + tl.program_id(1) * (2 + 2 * C), count, mean_of_x, M2, channel, known, C
    )


@triton.jit
def _first_values(
    x_ptr: tl.tensor,
    mask_ptr: tl.tensor | None,
    step: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """The first value of each channel in a step, `(K,)`; 0 where it is masked."""
    _, known = own_channels(C, K)
    origin, place, _ = locate(step, C, S, K, P, CHANNELS_LAST)
    stride = 1 if CHANNELS_LAST else S
    live = known
    if mask_ptr is not None:
        live = tl.load(mask_ptr + place + tl.zeros((K,), tl.int32), mask=known, other=0) != 0
    return tl.load(x_ptr + origin + tl.arange(0, K) * stride, mask=live, other=0)


@triton.jit
def _store_packed(
    row_ptr: tl.tensor,
    count: tl.tensor,
    mean: tl.tensor,
    M2: tl.tensor,
    channel: tl.tensor,
    known: tl.tensor,
    C: tl.tensor,
) -> None:
    """Store moments in the form of `syncbn.norm.moments`; the count is an integer."""
    if tl.program_id(0) == 0:
        tl.store(row_ptr, count % LOW_BITS)
        tl.store(row_ptr + 1, count // LOW_BITS)
    tl.store(row_ptr + 2 + channel, mean, mask=known)
    tl.store(row_ptr + 2 + C + channel, M2, mask=known)


@triton.jit
def _row_counts(rows_ptr: tl.tensor, row: tl.tensor, W: tl.tensor, C: tl.tensor) -> tl.tensor:
    """The counts in rows of packed moments, float64; 0 beyond the last row."""
    start = rows_ptr + row * (2 + 2 * C)
    low = tl.load(start, mask=row < W, other=0).to(tl.float64)
    return low + tl.load(start + 1, mask=row < W, other=0).to(tl.float64) * LOW_BITS


@triton.jit
def merged(
    rows_ptr: tl.tensor, W: tl.tensor, C: tl.tensor, ROWS: tl.constexpr, K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`syncbn.norm.moments.merge` of W rows of packed moments, for this program's channels, in float64."""
    channel, known = own_channels(C, K)
    total = tl.full((), 0, tl.float64)
    mean = tl.zeros((K,), tl.float64)
    M2 = tl.zeros((K,), tl.float64)
    for start in range(0, W, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < W)[:, None] & known[None, :]
        count = _row_counts(rows_ptr, row, W, C)
        place = rows_ptr + row[:, None] * (2 + 2 * C) + 2 + channel[None, :]
        total += tl.sum(count, 0)
        mean += tl.sum(count[:, None] * tl.load(place, mask=live, other=0).to(tl.float64), 0)
    mean = mean / tl.maximum(total, 1.0)
    for start in range(0, W, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < W)[:, None] & known[None, :]
        count = _row_counts(rows_ptr, row, W, C)
        place = rows_ptr + row[:, None] * (2 + 2 * C) + 2 + channel[None, :]
        between = tl.load(place, mask=live, other=0).to(tl.float64) - mean[None, :]
        within = tl.load(place + C, mask=live, other=0).to(tl.float64)
        M2 += tl.sum(within + count[:, None] * between * between, 0)
    return total, mean, M2


@triton.jit(do_not_specialize=SIZES)
def combine_moments_kernel(
    rows_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Packed moments of the union of W rows."""
    channel, known = own_channels(C, K)
    total, mean, M2 = merged(rows_ptr, W, C, ROWS, K)
    _store_packed(packed_ptr, total.to(tl.int64), mean, M2, channel, known, C)


@triton.jit(do_not_specialize=SIZES)
def backward_sums_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    residual_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    output_ptr: tl.tensor | None,
    rows_ptr: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """One row a program: C sums of dz, then C sums of dz * xhat. What is masked is loaded as 0 and adds 0."""
    C, S = aligned(C, S, VECTOR, CHANNELS_LAST)
    first, last = own_steps(steps, steps_per_program)
    channel, known = own_channels(C, K)
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    mean, invstd, scale, bias = coefficients(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known
    )
    sum_dz = tl.zeros((K,), mean.dtype)
    sum_dz_centred = tl.zeros((K,), mean.dtype)
    for step in range(first, last):
        origin, place, room = locate(step, C, S, K, P, CHANNELS_LAST)
        live = known[:, None] & kept(mask_ptr, place, room, P)[None, :]
        dy = load_tile(dy_ptr + origin, offsets, live, mean.dtype, False)
        centred = load_tile(x_ptr + origin, offsets, live, mean.dtype, False) - mean
        dz = before_act(
            dy, centred, scale, bias, residual_ptr, output_ptr, origin, offsets, live, ACT
        )
        sum_dz += tl.sum(dz, 1)
        sum_dz_centred += tl.sum(dz * centred, 1)
    row_ptr = rows_ptr + tl.program_id(1) * 2 * C + channel
    tl.store(row_ptr, sum_dz, mask=known)
    tl.store(row_ptr + C, sum_dz_centred * tl.sum(invstd, 1), mask=known)


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
    channel, known = own_channels(C, K)
    sums = tl.zeros((K,), tl.float64)
    for start in range(0, W, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < W)[:, None] & known[None, :]
        sums += tl.sum(
            tl.load(rows_ptr + row[:, None] * C + channel[None, :], mask=live, other=0), 0
        )
    tl.store(sums_ptr + channel, sums, mask=known)
