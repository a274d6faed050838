# pyright: reportArgumentType=false
"""Elementwise kernels in Triton: normalise forward, the gradients of the input and of the residual backward.

Programs walk their steps backwards, because what a reduction read last is still in the L2 cache. Values read for the
last time in a pass are marked evict_first.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.activations import activate, has_unit_slope, slope, slope_from_bits
from syncbn.norm.backends.triton.tiles import (
    SIZES,
    aligned,
    coefficient,
    coefficients,
    load_bits,
    load_tile,
    locate,
    position_mask,
    program_channels,
    program_steps,
    store_bits,
    store_tile,
    tile_offsets,
)


@triton.jit
def grad_before_act(
    dy: tl.tensor,
    centred: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    residual_ptr: tl.tensor | None,
    output_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    origin: tl.tensor,
    offsets: tl.tensor,
    live: tl.tensor,
    row: tl.tensor,
    remaining: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> tl.tensor:
    """The gradient of z: dz = dy * act'(z), from z as forward computed it, or from the saved y or bits."""
    if ACT == 0:
        dz = dy
    elif bits_ptr is not None:
        unit_slope = load_bits(bits_ptr, live, origin, row, remaining, C, S, K, P, CHANNELS_LAST)
        dz = dy * slope_from_bits(unit_slope, dy.dtype, ACT)
    else:
        if output_ptr is not None:
            z = load_tile(output_ptr + origin, offsets, live, dy.dtype, False)
        else:
            z = centred * scale + bias
            if residual_ptr is not None:
                z += load_tile(residual_ptr + origin, offsets, live, dy.dtype, False)
        dz = dy * slope(z, ACT)
    return dz


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
    K: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """Y = act((x - mean) * invstd * weight + bias + residual); the mean goes first, so that a large one cancels."""
    C, S = aligned(C, S, VECTOR, CHANNELS_LAST)
    first, last = program_steps(steps, steps_per_program)
    channel, valid = program_channels(C, K)
    mean, _, scale, bias = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, valid)
    normalize_steps(
        x_ptr,
        mean,
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
        valid,
        K,
        P,
        CHANNELS_LAST,
        ACT,
    )


@triton.jit
def normalize_steps(
    x_ptr: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    residual_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    bits_ptr: tl.tensor | None,
    y_ptr: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    valid: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """A program's steps of y, the last one first."""
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    for done in range(last - first):
        origin, position, remaining, row = locate(last - 1 - done, C, S, K, P, CHANNELS_LAST)
        live = valid[:, None] & position_mask(mask_ptr, position, remaining, P)[None, :]
        z = (load_tile(x_ptr + origin, offsets, live, mean.dtype, True) - mean) * scale + bias
        if residual_ptr is not None:
            z += load_tile(residual_ptr + origin, offsets, live, mean.dtype, True)
        if bits_ptr is not None:
            unit_slope = has_unit_slope(z, ACT)
            store_bits(
                bits_ptr, unit_slope, origin, row, remaining, valid, C, S, K, P, CHANNELS_LAST
            )
        y = tl.where(live, activate(z, ACT), 0.0)
        store_tile(y_ptr + origin, offsets, y, valid, remaining, P)


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
    K: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """Dx = weight * invstd * (dz - mean of dz - xhat * mean of dz * xhat), the means from the sums of W ranks."""
    C, S = aligned(C, S, VECTOR, CHANNELS_LAST)
    first, last = program_steps(steps, steps_per_program)
    channel, valid = program_channels(C, K)
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    mean, invstd, scale, bias = coefficients(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, valid
    )
    total = tl.maximum(tl.load(total_ptr), 1.0).to(mean.dtype)
    sum_dz = coefficient(sums_ptr, channel, valid, 0.0, mean.dtype)
    sum_dz_xhat = coefficient(sums_ptr + C, channel, valid, 0.0, mean.dtype)
    for rank in range(1, W):
        sum_dz += coefficient(sums_ptr + rank * 2 * C, channel, valid, 0.0, mean.dtype)
        sum_dz_xhat += coefficient(sums_ptr + rank * 2 * C + C, channel, valid, 0.0, mean.dtype)
    mean_dz, xhat_factor = sum_dz / total, sum_dz_xhat / total * invstd
    for done in range(last - first):
        origin, position, remaining, row = locate(last - 1 - done, C, S, K, P, CHANNELS_LAST)
        live = valid[:, None] & position_mask(mask_ptr, position, remaining, P)[None, :]
        dy = load_tile(dy_ptr + origin, offsets, live, mean.dtype, True)
        centred = load_tile(x_ptr + origin, offsets, live, mean.dtype, True) - mean
        dz = grad_before_act(
            dy,
            centred,
            scale,
            bias,
            residual_ptr,
            output_ptr,
            bits_ptr,
            origin,
            offsets,
            live,
            row,
            remaining,
            C,
            S,
            K,
            P,
            CHANNELS_LAST,
            ACT,
        )
        dx = tl.where(live, (dz - mean_dz - centred * xhat_factor) * scale, 0.0)
        store_tile(dx_ptr + origin, offsets, dx, valid, remaining, P)


@triton.jit(do_not_specialize=SIZES)
def grad_residual_kernel(
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
    dz_ptr: tl.tensor,
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
    """The gradient of the residual: dz."""
    C, S = aligned(C, S, VECTOR, CHANNELS_LAST)
    first, last = program_steps(steps, steps_per_program)
    channel, valid = program_channels(C, K)
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    mean, _, scale, bias = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, valid)
    for done in range(last - first):
        origin, position, remaining, row = locate(last - 1 - done, C, S, K, P, CHANNELS_LAST)
        live = valid[:, None] & position_mask(mask_ptr, position, remaining, P)[None, :]
        dy = load_tile(dy_ptr + origin, offsets, live, mean.dtype, False)
        centred = load_tile(x_ptr + origin, offsets, live, mean.dtype, False) - mean
        dz = grad_before_act(
            dy,
            centred,
            scale,
            bias,
            residual_ptr,
            output_ptr,
            bits_ptr,
            origin,
            offsets,
            live,
            row,
            remaining,
            C,
            S,
            K,
            P,
            CHANNELS_LAST,
            ACT,
        )
        store_tile(dz_ptr + origin, offsets, dz, valid, remaining, P)
