# pyright: reportArgumentType=false
"""Element-wise maps over an input in Triton: normalise forward, the input's and the residual's gradient backward.

Programs walk their steps backwards: what a reduction read last is still in the L2 cache. Values read for the last time
in a pass are marked evict_first.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.triton.activations import activate, slope, slope_where, upper
from syncbn.norm.backends.triton.bits import load_bits, store_bits
from syncbn.norm.backends.triton.tiles import (
    SIZES,
    aligned,
    coefficient,
    coefficients,
    kept,
    load_tile,
    locate,
    own_channels,
    own_steps,
    store_tile,
    tile_offsets,
)


@triton.jit
def before_act(
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
    room: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> tl.tensor:
    """The gradient of z: dz = dy * act'(z), with z as forward computed it, or y or its bits where those were kept."""
    if ACT == 0:
        dz = dy
    elif bits_ptr is not None:
        above = load_bits(bits_ptr, live, origin, row, room, C, S, K, P, CHANNELS_LAST)
        dz = dy * slope_where(above, dy.dtype, ACT)
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
    first, last = own_steps(steps, steps_per_program)
    channel, known = own_channels(C, K)
    mean, _, scale, bias = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known)
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
        known,
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
    known: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """A program's own steps of y, the last one first."""
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    for done in range(last - first):
        origin, place, room, row = locate(last - 1 - done, C, S, K, P, CHANNELS_LAST)
        live = known[:, None] & kept(mask_ptr, place, room, P)[None, :]
        z = (load_tile(x_ptr + origin, offsets, live, mean.dtype, True) - mean) * scale + bias
        if residual_ptr is not None:
            z += load_tile(residual_ptr + origin, offsets, live, mean.dtype, True)
        if bits_ptr is not None:
            above = upper(z, ACT)
            store_bits(bits_ptr, above, origin, row, room, known, C, S, K, P, CHANNELS_LAST)
        y = tl.where(live, activate(z, ACT), 0.0)
        store_tile(y_ptr + origin, offsets, y, known, room, P)


@triton.jit(do_not_specialize=SIZES)
def backward_input_kernel(
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
    first, last = own_steps(steps, steps_per_program)
    channel, known = own_channels(C, K)
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    mean, invstd, scale, bias = coefficients(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known
    )
    total = tl.maximum(tl.load(total_ptr), 1.0).to(mean.dtype)
    sum_dz = coefficient(sums_ptr, channel, known, 0.0, mean.dtype)
    sum_dz_xhat = coefficient(sums_ptr + C, channel, known, 0.0, mean.dtype)
    for rank in range(1, W):
        sum_dz += coefficient(sums_ptr + rank * 2 * C, channel, known, 0.0, mean.dtype)
        sum_dz_xhat += coefficient(sums_ptr + rank * 2 * C + C, channel, known, 0.0, mean.dtype)
    mean_dz, tilt = sum_dz / total, sum_dz_xhat / total * invstd
    for done in range(last - first):
        origin, place, room, row = locate(last - 1 - done, C, S, K, P, CHANNELS_LAST)
        live = known[:, None] & kept(mask_ptr, place, room, P)[None, :]
        dy = load_tile(dy_ptr + origin, offsets, live, mean.dtype, True)
        centred = load_tile(x_ptr + origin, offsets, live, mean.dtype, True) - mean
        dz = before_act(
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
            room,
            C,
            S,
            K,
            P,
            CHANNELS_LAST,
            ACT,
        )
        dx = tl.where(live, (dz - mean_dz - centred * tilt) * scale, 0.0)
        store_tile(dx_ptr + origin, offsets, dx, known, room, P)


@triton.jit(do_not_specialize=SIZES)
def backward_residual_kernel(
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
    first, last = own_steps(steps, steps_per_program)
    channel, known = own_channels(C, K)
    offsets = tile_offsets(C, S, K, P, CHANNELS_LAST)
    mean, _, scale, bias = coefficients(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known)
    for done in range(last - first):
        origin, place, room, row = locate(last - 1 - done, C, S, K, P, CHANNELS_LAST)
        live = known[:, None] & kept(mask_ptr, place, room, P)[None, :]
        dy = load_tile(dy_ptr + origin, offsets, live, mean.dtype, False)
        centred = load_tile(x_ptr + origin, offsets, live, mean.dtype, False) - mean
        dz = before_act(
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
            room,
            C,
            S,
            K,
            P,
            CHANNELS_LAST,
            ACT,
        )
        store_tile(dz_ptr + origin, offsets, dz, known, room, P)
