# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""What is done once a channel, in Triton: merging ranks, and moving running statistics; one launch each, or all in one.

`eps` and `momentum` come as two float32, a value and what that leaves over, because Triton passes a Python
float as float32: float64 statistics would see an `eps` that is off in its eighth digit.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.maps import normalize_steps
from syncbn.norm.backends.triton.rows import merged
from syncbn.norm.backends.triton.tiles import (
    SIZES,
    aligned,
    coefficient,
    own_channels,
    own_steps,
)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    packed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    var_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    eps_high: tl.tensor,
    eps_low: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    ONCE: tl.constexpr,
) -> None:
    """The total, means, variances and inverse standard deviations of W rows of packed moments."""
    channel, known = own_channels(C, K)
    total, mean, M2 = merged(packed_ptr, W, C, ROWS, K, ONCE)
    var = M2 / tl.maximum(total, 1.0)
    invstd = 1 / tl.sqrt(var + eps_high + eps_low)
    if tl.program_id(0) == 0:
        tl.store(total_ptr, total)
    _store_statistics(mean_ptr, var_ptr, invstd_ptr, mean, var, invstd, channel, known)


@triton.jit
def _store_statistics(
    mean_ptr: tl.tensor,
    var_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    mean: tl.tensor,
    var: tl.tensor,
    invstd: tl.tensor,
    channel: tl.tensor,
    known: tl.tensor,
) -> None:
    tl.store(mean_ptr + channel, mean, mask=known)
    tl.store(var_ptr + channel, var, mask=known)
    tl.store(invstd_ptr + channel, invstd, mask=known)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
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
    K: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    ONCE: tl.constexpr,
) -> None:
    """All that follows the exchange: merge, move the running statistics, normalise, to the bits of the three kernels.

    Each program merges the moments of its own channels, which is little work and spares two launches; the first of
    those that share channels stores what came out.
    """
    C, S = aligned(C, S, VECTOR, CHANNELS_LAST)
    first, last = own_steps(steps, steps_per_program)
    channel, known = own_channels(C, K)
    total, mean, M2 = merged(packed_ptr, W, C, ROWS, K, ONCE)
    var = M2 / tl.maximum(total, 1.0)
    invstd = 1 / tl.sqrt(var + eps_high + eps_low)
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    mean, invstd = mean.to(dtype), invstd.to(dtype)
    if tl.program_id(1) == 0:
        _store_statistics(mean_ptr, var_ptr, invstd_ptr, mean, var, invstd, channel, known)
        seen = (total > 0).to(tl.float64)
        if tl.program_id(0) == 0:
            tl.store(total_ptr, total)
            if num_batches_tracked_ptr is not None:
                batches = tl.load(num_batches_tracked_ptr) + seen.to(tl.int64)
                tl.store(num_batches_tracked_ptr, batches)
        if running_mean_ptr is not None:
            factor = seen * momentum_high + seen * momentum_low
            bessel = _bessel(total)
            _move(running_mean_ptr + channel, mean.to(tl.float64), factor, known)
            unbiased = var.to(dtype).to(tl.float64) * bessel
            _move(running_var_ptr + channel, unbiased, factor, known)
    scale = invstd[:, None] * coefficient(weight_ptr, channel, known, 1.0, dtype)
    bias = coefficient(bias_ptr, channel, known, 0.0, dtype)
    normalize_steps(
        x_ptr,
        mean[:, None],
        scale,
        bias,
        residual_ptr,
        mask_ptr,
        bits_ptr,
        y_ptr,
        C,
        S,
        first,
        last,
        known,
        K,
        P,
        CHANNELS_LAST,
        ACT,
    )


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
    """Move running statistics in one program, because each channel's weight may need the count that it moves too."""
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
        known = channel < C
        mean = tl.load(mean_ptr + channel, mask=known, other=0).to(tl.float64)
        var = tl.load(var_ptr + channel, mask=known, other=0).to(tl.float64) * bessel
        _move(running_mean_ptr + channel, mean, factor, known)
        _move(running_var_ptr + channel, var, factor, known)


@triton.jit
def _bessel(total: tl.tensor) -> tl.tensor:
    """N / (N - 1); 1 for fewer than two values."""
    return total / tl.maximum(total - 1, 1.0)


@triton.jit
def _move(running_ptr: tl.tensor, new: tl.tensor, factor: tl.tensor, known: tl.tensor) -> None:
    """Move running values towards new ones by `factor`; by 0, with all new ones 0, after an empty batch."""
    old = tl.load(running_ptr, mask=known, other=0)
    moved = old.to(tl.float64) * (1 - factor) + new * factor
    if old.dtype == tl.bfloat16:
        moved = moved.to(tl.float32)  # the interpreter reaches bfloat16 from nowhere else
    tl.store(running_ptr, moved, mask=known)
