# pyright: reportArgumentType=false
"""How a Triton program walks its tiles of channels x positions, whatever the memory layout; see `triton_forms`."""

import triton
import triton.language as tl

SIZES = ("C", "S", "steps", "steps_per_program", "W")
"""Parameters that are not worth a compilation for being 1 or a multiple of 16: VECTOR says what matters of them."""


@triton.jit
def aligned(
    C: tl.tensor, S: tl.tensor, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """C and S unchanged; of the one that rows in memory have, the compiler now sees that VECTOR divides it."""
    if CHANNELS_LAST:
        C = C // VECTOR * VECTOR
    else:
        S = S // VECTOR * VECTOR
    return C, S


@triton.jit
def own_steps(steps: tl.tensor, steps_per_program: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first step of this program, and the one after its last."""
    first = tl.program_id(1) * steps_per_program
    return first, tl.minimum(first + steps_per_program, steps)


@triton.jit
def tile_offsets(
    C: tl.tensor, S: tl.tensor, K: tl.constexpr, P: tl.constexpr, CHANNELS_LAST: tl.constexpr
) -> tl.tensor:
    """Where the values of a tile lie, `(K, P)`, counted from its first."""
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
    """Of a step: its first value, its first position over the batch, positions from there to the image's end, its row.

    That is the first of its planes, counted over the batch.
    """
    chunks = tl.cdiv(S, P)
    image = step // chunks
    start = (step - image * chunks) * P
    place = image.to(tl.int64) * S + start  # offsets may exceed 32 bits
    channel = tl.program_id(0).to(tl.int64) * K
    origin = channel * (1 if CHANNELS_LAST else S) + start.to(tl.int64) * (
        C if CHANNELS_LAST else 1
    )
    row = image.to(tl.int64) * C + channel
    return origin + image.to(tl.int64) * S * C, place, S - start, row


@triton.jit
def kept(
    mask_ptr: tl.tensor | None, place: tl.tensor, room: tl.tensor, P: tl.constexpr
) -> tl.tensor:
    """Which of the P positions from `place` on exist and are not masked."""
    position = tl.arange(0, P)
    keep = position < room
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + place + position, mask=keep, other=0) != 0
    return keep


@triton.jit
def own_channels(C: tl.tensor, K: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The channels of this program, `(K,)`, and which of them exist."""
    channel = tl.program_id(0) * K + tl.arange(0, K)
    return channel, channel < C


@triton.jit
def coefficient(
    ptr: tl.tensor | None,
    channel: tl.tensor,
    known: tl.tensor,
    default: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Values of a per-channel tensor in `dtype`, `(K, 1)`; `default` where there is none."""
    if ptr is None:
        values = tl.full(channel.shape, default, dtype)
    else:
        values = tl.load(ptr + channel, mask=known, other=0).to(dtype)
    return values[:, None]


@triton.jit
def coefficients(
    mean_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    channel: tl.tensor,
    known: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Mean, invstd, invstd * weight and bias, each `(K, 1)` in the dtype of the mean."""
    mean = tl.load(mean_ptr + channel, mask=known, other=0)[:, None]
    invstd = coefficient(invstd_ptr, channel, known, 0.0, mean.dtype)
    scale = invstd * coefficient(weight_ptr, channel, known, 1.0, mean.dtype)
    return mean, invstd, scale, coefficient(bias_ptr, channel, known, 0.0, mean.dtype)


@triton.jit
def load_tile(
    ptr: tl.tensor,
    offsets: tl.tensor,
    live: tl.tensor,
    dtype: tl.constexpr,
    LAST_USE: tl.constexpr,
) -> tl.tensor:
    """The live values of a tile in `dtype`, 0 for the others; what is used for the last time may leave the cache."""
    tile = tl.load(
        ptr + offsets, mask=live, other=0, eviction_policy="evict_first" if LAST_USE else ""
    )
    return tile.to(dtype)


@triton.jit
def store_tile(
    ptr: tl.tensor,
    offsets: tl.tensor,
    values: tl.tensor,
    known: tl.tensor,
    room: tl.tensor,
    P: tl.constexpr,
) -> None:
    """Store the values of a tile that exist, masked ones too, in the dtype of what they are stored to."""
    exists = known[:, None] & (tl.arange(0, P) < room)[None, :]
    tl.store(ptr + offsets, values, mask=exists)
