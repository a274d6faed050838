# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Per-channel statistics in Triton: merging packed moments, running statistics, and all that follows the exchange.

Rows of packed moments are merged in a fixed order and in float64. `eps` and `momentum` are passed as two float32, a
value and its remainder, because Triton passes a Python float as float32: float64 statistics would see an `eps` that is
off in its eighth digit.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.elementwise import normalize_steps
from syncbn.norm.backends.triton.tiles import (
    SIZES,
    Coefficients,
    coefficient,
    program_channels,
    this_program,
)
from syncbn.norm.moments import LOW_BITS as MOMENTS_LOW_BITS

LOW_BITS = tl.constexpr(MOMENTS_LOW_BITS)


@triton.jit
def store_packed(
    row_ptr: tl.tensor,
    count: tl.tensor,
    mean: tl.tensor,
    M2: tl.tensor,
    channel: tl.tensor,
    valid: tl.tensor,
    C: tl.tensor,
) -> None:
    """Store packed moments, as of `syncbn.norm.moments`; the count is an integer."""
    if tl.program_id(0) == 0:
        tl.store(row_ptr, count % LOW_BITS)
        tl.store(row_ptr + 1, count // LOW_BITS)
    tl.store(row_ptr + 2 + channel, mean, mask=valid)
    tl.store(row_ptr + 2 + C + channel, M2, mask=valid)


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
    channel, valid = program_channels(C, K)
    row = (start + tl.arange(0, ROWS))[:, None]
    live = (row < W) & valid[None, :]
    row_ptr = rows_ptr + row * (2 + 2 * C)
    low = tl.load(row_ptr, mask=row < W, other=0).to(tl.float64)
    count = low + tl.load(row_ptr + 1, mask=row < W, other=0).to(tl.float64) * LOW_BITS
    row_ptr += 2 + channel[None, :]
    mean = tl.load(row_ptr, mask=live, other=0).to(tl.float64)
    return count, mean, tl.load(row_ptr + C, mask=live, other=0).to(tl.float64)


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

    ONCE: ROWS is at least W, so that rows are read once and stay in registers.
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
def finish_forward_kernel(
    packed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    var_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    running_mean_ptr: tl.tensor | None,
    running_var_ptr: tl.tensor | None,
    num_batches_tracked_ptr: tl.tensor | None,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    residual_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    y_ptr: tl.tensor,
    eps_high: tl.tensor,
    eps_low: tl.tensor,
    momentum_high: tl.tensor,
    momentum_low: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    steps: tl.tensor,
    steps_per_program: tl.tensor,
    SHAPE: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    ONCE: tl.constexpr,
) -> None:
    """All that follows the exchange: merge, update the running statistics, normalise.

    Each program merges the moments of its own channels, which is little work and saves two launches; the first of those
    that share channels stores the statistics.
    """
    program = this_program(C, S, steps, steps_per_program, SHAPE)
    channel, valid = program.channel, program.valid
    C = program.C
    total, mean, M2 = merged(packed_ptr, W, C, ROWS, SHAPE.K, ONCE)
    var = M2 / tl.maximum(total, 1.0)
    invstd = 1 / tl.sqrt(var + eps_high + eps_low)
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    mean, var, invstd = mean.to(dtype), var.to(dtype), invstd.to(dtype)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + channel, mean, mask=valid)
        tl.store(var_ptr + channel, var, mask=valid)
        tl.store(invstd_ptr + channel, invstd, mask=valid)
        seen = (total > 0).to(tl.float64)
        if tl.program_id(0) == 0:
            tl.store(total_ptr, total)
            if num_batches_tracked_ptr is not None:
                batches = tl.load(num_batches_tracked_ptr) + seen.to(tl.int64)
                tl.store(num_batches_tracked_ptr, batches)
        if running_mean_ptr is not None:
            factor = seen * momentum_high + seen * momentum_low
            unbiased = var.to(tl.float64) * _bessel(total)
            _move(running_mean_ptr + channel, mean.to(tl.float64), factor, valid)
            _move(running_var_ptr + channel, unbiased, factor, valid)
    scale = invstd[:, None] * coefficient(weight_ptr, program, 1.0, dtype)
    bias = coefficient(bias_ptr, program, 0.0, dtype)
    given = Coefficients(mean[:, None], invstd[:, None], scale, bias)
    normalize_steps(x_ptr, given, residual_ptr, mask_ptr, bits_ptr, y_ptr, program, SHAPE, ACT)


@triton.jit(do_not_specialize=SIZES)
def update_kernel(
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    num_batches_tracked_ptr: tl.tensor | None,
    total_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    var_ptr: tl.tensor,
    momentum_high: tl.tensor,
    momentum_low: tl.tensor,
    C: tl.tensor,
    CUMULATIVE: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Update running statistics in one program: each channel's weight may need the count that the program updates."""
    total = tl.load(total_ptr)
    seen = (total > 0).to(tl.float64)
    factor = seen * momentum_high + seen * momentum_low
    if num_batches_tracked_ptr is not None:
        batches = tl.load(num_batches_tracked_ptr) + seen.to(tl.int64)
        tl.store(num_batches_tracked_ptr, batches)
        if CUMULATIVE:
            factor = seen / tl.maximum(batches, 1).to(tl.float64)
    bessel = _bessel(total)
    for start in range(0, C, K):
        channel = start + tl.arange(0, K)
        valid = channel < C
        mean = tl.load(mean_ptr + channel, mask=valid, other=0).to(tl.float64)
        var = tl.load(var_ptr + channel, mask=valid, other=0).to(tl.float64) * bessel
        _move(running_mean_ptr + channel, mean, factor, valid)
        _move(running_var_ptr + channel, var, factor, valid)


@triton.jit
def _bessel(total: tl.tensor) -> tl.tensor:
    """N / (N - 1); 1 for fewer than two values."""
    return total / tl.maximum(total - 1, 1.0)


@triton.jit
def _move(running_ptr: tl.tensor, new: tl.tensor, factor: tl.tensor, valid: tl.tensor) -> None:
    """Move running values towards new ones by `factor`, which is 0 after an empty batch."""
    old = tl.load(running_ptr, mask=valid, other=0)
    moved = old.to(tl.float64) * (1 - factor) + new * factor
    if old.dtype == tl.bfloat16:
        moved = moved.to(tl.float32)  # the interpreter reaches bfloat16 from nowhere else
    tl.store(running_ptr, moved, mask=valid)
