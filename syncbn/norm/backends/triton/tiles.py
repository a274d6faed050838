# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
"""Tiles of channels x positions in Triton: where they lie in any memory layout, and how they are loaded and stored.

See `tile_plan` for how an input is divided, and `derivative_bits` for the layout of bits.
"""

import triton
import triton.language as tl

SIZES = ("C", "S", "steps", "steps_per_program", "W")
"""Parameters for which Triton compiles no variant when they are 1 or a multiple of 16: VECTOR holds what matters."""


@triton.jit
def aligned(
    C: tl.tensor, S: tl.tensor, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """C and S unchanged; the compiler now sees that VECTOR divides the one that follows itself in memory."""
    if CHANNELS_LAST:
        C = C // VECTOR * VECTOR
    else:
        S = S // VECTOR * VECTOR
    return C, S


@triton.jit
def program_steps(steps: tl.tensor, steps_per_program: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first step of this program, and the one after its last."""
    first = tl.program_id(1) * steps_per_program
    return first, tl.minimum(first + steps_per_program, steps)


@triton.jit
def tile_offsets(
    C: tl.tensor, S: tl.tensor, K: tl.constexpr, P: tl.constexpr, CHANNELS_LAST: tl.constexpr
) -> tl.tensor:
    """Offsets of a tile's values from its first, `(K, P)`."""
    to_next_channel = 1 if CHANNELS_LAST else S
    to_next_position = C if CHANNELS_LAST else 1
    positions = tl.arange(0, P)[None, :] * to_next_position
    return tl.arange(0, K)[:, None] * to_next_channel + positions


@triton.jit
def locate(
    step: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where a step's tile begins.

    Returns:
        The offset of its first value, its first position counted over the batch, the positions from there to the end
        of the image, and its first plane (image x channel) counted over the batch.
    """
    chunks = tl.cdiv(S, P)
    image = step // chunks
    start = (step - image * chunks) * P
    position = image.to(tl.int64) * S + start  # offsets may exceed 32 bits
    channel = tl.program_id(0).to(tl.int64) * K
    origin = channel * (1 if CHANNELS_LAST else S) + start.to(tl.int64) * (
        C if CHANNELS_LAST else 1
    )
    row = image.to(tl.int64) * C + channel
    return origin + image.to(tl.int64) * S * C, position, S - start, row


@triton.jit
def position_mask(
    mask_ptr: tl.tensor | None, position: tl.tensor, remaining: tl.tensor, P: tl.constexpr
) -> tl.tensor:
    """Which of the P positions from `position` on exist and are not masked."""
    offset = tl.arange(0, P)
    keep = offset < remaining
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + position + offset, mask=keep, other=0) != 0
    return keep


@triton.jit
def program_channels(C: tl.tensor, K: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The channels of this program, `(K,)`, and which of them exist."""
    channel = tl.program_id(0) * K + tl.arange(0, K)
    return channel, channel < C


@triton.jit
def coefficient(
    ptr: tl.tensor | None,
    channel: tl.tensor,
    valid: tl.tensor,
    default: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Values of a per-channel tensor in `dtype`, `(K, 1)`; `default` where there is none."""
    if ptr is None:
        values = tl.full(channel.shape, default, dtype)
    else:
        values = tl.load(ptr + channel, mask=valid, other=0).to(dtype)
    return values[:, None]


@triton.jit
def coefficients(
    mean_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    channel: tl.tensor,
    valid: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Mean, invstd, invstd * weight and bias, each `(K, 1)` in the dtype of the mean."""
    mean = tl.load(mean_ptr + channel, mask=valid, other=0)[:, None]
    invstd = coefficient(invstd_ptr, channel, valid, 0.0, mean.dtype)
    scale = invstd * coefficient(weight_ptr, channel, valid, 1.0, mean.dtype)
    return mean, invstd, scale, coefficient(bias_ptr, channel, valid, 0.0, mean.dtype)


@triton.jit
def load_tile(
    ptr: tl.tensor,
    offsets: tl.tensor,
    live: tl.tensor,
    dtype: tl.constexpr,
    LAST_USE: tl.constexpr,
) -> tl.tensor:
    """The live values of a tile in `dtype`, 0 for the others; LAST_USE lets them leave the cache."""
    tile = tl.load(
        ptr + offsets, mask=live, other=0, eviction_policy="evict_first" if LAST_USE else ""
    )
    return tile.to(dtype)


@triton.jit
def store_tile(
    ptr: tl.tensor,
    offsets: tl.tensor,
    values: tl.tensor,
    valid: tl.tensor,
    remaining: tl.tensor,
    P: tl.constexpr,
) -> None:
    """Store the values of a tile that exist, masked ones too, in the dtype of `ptr`."""
    exists = valid[:, None] & (tl.arange(0, P) < remaining)[None, :]
    tl.store(ptr + offsets, values, mask=exists)


@triton.jit
def row_bytes(S: tl.tensor) -> tl.tensor:
    """Bytes of a row of S positions in a plane."""
    return (S + 63) // 64 * 8


@triton.jit
def store_bits(
    bits_ptr: tl.tensor,
    bits: tl.tensor,
    origin: tl.tensor,
    row: tl.tensor,
    remaining: tl.tensor,
    valid: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Store a bit for each of `bits` `(K, P)`; for `origin`, `row` and `remaining` see `locate`."""
    start, _, _ = _bytes(origin, row, remaining, C, S, K, P, CHANNELS_LAST)
    eight = tl.arange(0, 8)
    if CHANNELS_LAST:
        parts = tl.reshape(bits.to(tl.int32), (K // 8, 8, P)) << eight[None, :, None]
        joined = tl.sum(parts, 1)
        groups = tl.sum(tl.reshape(valid.to(tl.int32), (K // 8, 8)), 1) > 0
        offsets = tl.arange(0, K // 8)[:, None] + tl.arange(0, P)[None, :] * (C // 8)
        exists = groups[:, None] & (tl.arange(0, P) < remaining)[None, :]
        tl.store(bits_ptr + start + offsets, joined.to(tl.uint8), mask=exists)
    else:
        CHUNK: tl.constexpr = P if P < 64 else 64
        CHUNKS: tl.constexpr = P // CHUNK
        split = tl.reshape(bits.to(tl.int64), (K, CHUNKS, CHUNK // 8, 8))
        bytes_of_eight = tl.sum(split << (eight * 8)[None, None, None, :], 3)
        words = tl.sum(bytes_of_eight << tl.arange(0, CHUNK // 8)[None, None, :], 2)
        chunk = tl.arange(0, CHUNKS)
        offsets = tl.arange(0, K)[:, None] * (row_bytes(S) // 8) + chunk[None, :]
        exists = valid[:, None] & (chunk * 64 < remaining)[None, :]
        words_ptr = (bits_ptr + start).to(tl.pointer_type(tl.int64))
        tl.store(words_ptr + offsets, words, mask=exists)


@triton.jit
def load_bits(
    bits_ptr: tl.tensor,
    live: tl.tensor,
    origin: tl.tensor,
    row: tl.tensor,
    remaining: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """What `store_bits` stored, `(K, P)`; each value loads its byte, so that bits have the layout of values."""
    start, offsets, bit = _bytes(origin, row, remaining, C, S, K, P, CHANNELS_LAST)
    joined = tl.load(bits_ptr + start + offsets, mask=live, other=0).to(tl.int32)
    return ((joined >> bit) & 1) != 0


@triton.jit
def _bytes(
    origin: tl.tensor,
    row: tl.tensor,
    remaining: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The offset of a tile's first byte, of each value's byte from there, and the number of its bit in the byte."""
    channel, position = tl.arange(0, K)[:, None], tl.arange(0, P)[None, :]
    if CHANNELS_LAST:
        start = origin // 8
        offsets = channel // 8 + position * (C // 8)
        bit = channel % 8
    else:
        start = row * row_bytes(S) + (S - remaining) // 8
        offsets = channel * row_bytes(S) + position // 64 * 8 + position % 8
        bit = position // 8 % 8
    return start, offsets, bit
