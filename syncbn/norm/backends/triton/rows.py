# pyright: reportArgumentType=false, reportReturnType=false
"""Rows that programs or ranks left: packed moments that are merged, and sums that are added, in Triton.

In a fixed order and in float64: no atomics, so the same input gives the same bits.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.tiles import SIZES, own_channels

LOW_BITS = tl.constexpr(2**20)


@triton.jit
def store_packed(
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
def _packed_rows(
    rows_ptr: tl.tensor,
    start: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Counts `(ROWS, 1)`, means and M2s `(ROWS, K)` of packed moments from row `start` on, in float64; 0 beyond W."""
    channel, known = own_channels(C, K)
    row = (start + tl.arange(0, ROWS))[:, None]
    live = (row < W) & known[None, :]
    place = rows_ptr + row * (2 + 2 * C)
    low = tl.load(place, mask=row < W, other=0).to(tl.float64)
    count = low + tl.load(place + 1, mask=row < W, other=0).to(tl.float64) * LOW_BITS
    place += 2 + channel[None, :]
    mean = tl.load(place, mask=live, other=0).to(tl.float64)
    return count, mean, tl.load(place + C, mask=live, other=0).to(tl.float64)


@triton.jit
def merged(
    rows_ptr: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    ONCE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`syncbn.norm.moments.merge` of W rows of packed moments, for this program's channels, in float64.

    ONCE says that ROWS are no fewer than W: then they are read once, and stay in registers.
    """
    total = tl.full((1,), 0, tl.float64)
    mean = tl.zeros((K,), tl.float64)
    M2 = tl.zeros((K,), tl.float64)
    if ONCE:
        counts, means, M2s = _packed_rows(rows_ptr, 0, W, C, ROWS, K)
        total += tl.sum(counts, 0)
        mean = tl.sum(counts * means, 0) / tl.maximum(total, 1.0)
        between = means - mean[None, :]
        M2 = tl.sum(M2s + counts * between * between, 0)
    else:
        for start in range(0, W, ROWS):
            counts, means, _ = _packed_rows(rows_ptr, start, W, C, ROWS, K)
            total += tl.sum(counts, 0)
            mean += tl.sum(counts * means, 0)
        mean = mean / tl.maximum(total, 1.0)
        for start in range(0, W, ROWS):
            counts, means, M2s = _packed_rows(rows_ptr, start, W, C, ROWS, K)
            between = means - mean[None, :]
            M2 += tl.sum(M2s + counts * between * between, 0)
    return tl.sum(total, 0), mean, M2


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
    channel, known = own_channels(C, K)
    total, mean, M2 = merged(rows_ptr, W, C, ROWS, K, ONCE)
    store_packed(packed_ptr, total.to(tl.int64), mean, M2, channel, known, C)


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
