# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Tiles of channels x positions in Triton: where they lie in any memory layout, and how they are loaded and stored.

See `tile_plan` for how an input is divided, and `derivative_bits` for the layout of bits. Kernels take flat parameters,
as `launch` passes them; the functions that they call take named tuples, which cost no instruction.
"""

from typing import NamedTuple

import triton
import triton.language as tl

SIZES = ("C", "S", "steps", "steps_per_program", "W")
"""Parameters for which Triton compiles no variant when they are 1 or a multiple of 16: VECTOR holds what matters."""


class Program(NamedTuple):
    """What a program covers of images of C channels x S positions.

    Attributes:
        channel: its channels, `(K,)`.
        valid: which of them exist.
        offsets: of a tile's values from its first, `(K, P)`.
        first: its first step.
        last: the one after its last.
    """

    C: tl.tensor
    S: tl.tensor
    channel: tl.tensor
    valid: tl.tensor
    offsets: tl.tensor
    first: tl.tensor
    last: tl.tensor


class Tile(NamedTuple):
    """The values of a step.

    Attributes:
        origin: the offset of the first value.
        offsets: from there, `(K, P)`.
        row: the first plane (image x channel), counted over the batch.
        remaining: positions from the first to the end of the image.
        keep: positions that exist and are not masked, `(P,)`.
        live: the values of these, `(K, P)`.
        exists: values that exist, masked ones too, `(K, P)`.
    """

    origin: tl.tensor
    offsets: tl.tensor
    row: tl.tensor
    remaining: tl.tensor
    keep: tl.tensor
    live: tl.tensor
    exists: tl.tensor


class Coefficients(NamedTuple):
    """Of a program's channels, each `(K, 1)` in the dtype of the mean; `scale` is invstd * weight."""

    mean: tl.tensor
    invstd: tl.tensor
    scale: tl.tensor
    bias: tl.tensor


@triton.jit
def program_channels(C: tl.tensor, K: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The channels of this program, `(K,)`, and which of them exist."""
    channel = tl.program_id(0) * K + tl.arange(0, K)
    return channel, channel < C


@triton.jit
def this_program(
    C: tl.tensor, S: tl.tensor, steps: tl.tensor, steps_per_program: tl.tensor, SHAPE: tl.constexpr
) -> Program:
    """This program's part of a `TilePlan`, from the plan's sizes and its shape."""
    # unchanged, but the compiler sees that VECTOR divides the one that follows itself in memory
    if SHAPE.CHANNELS_LAST:
        C = C // SHAPE.VECTOR * SHAPE.VECTOR
    else:
        S = S // SHAPE.VECTOR * SHAPE.VECTOR
    channel, valid = program_channels(C, SHAPE.K)
    to_next_channel = 1 if SHAPE.CHANNELS_LAST else S
    to_next_position = C if SHAPE.CHANNELS_LAST else 1
    positions = tl.arange(0, SHAPE.P)[None, :] * to_next_position
    offsets = tl.arange(0, SHAPE.K)[:, None] * to_next_channel + positions
    first = tl.program_id(1) * steps_per_program
    last = tl.minimum(first + steps_per_program, steps)
    return Program(C, S, channel, valid, offsets, first, last)


@triton.jit
def tile_of(
    step: tl.tensor, program: Program, mask_ptr: tl.tensor | None, SHAPE: tl.constexpr
) -> Tile:
    """Where a step's tile lies; its mask is loaded here."""
    C, S = program.C, program.S
    P: tl.constexpr = SHAPE.P
    chunks = tl.cdiv(S, P)
    image = step // chunks
    start = (step - image * chunks) * P
    channel = tl.program_id(0).to(tl.int64) * SHAPE.K
    origin = channel * (1 if SHAPE.CHANNELS_LAST else S)
    origin += start.to(tl.int64) * (C if SHAPE.CHANNELS_LAST else 1)
    origin += image.to(tl.int64) * S * C  # offsets may exceed 32 bits
    row = image.to(tl.int64) * C + channel
    offset = tl.arange(0, P)
    inside = offset < S - start
    keep = inside
    if mask_ptr is not None:
        mask_ptr += image.to(tl.int64) * S + start
        keep = tl.load(mask_ptr + offset, mask=inside, other=0) != 0
    live = program.valid[:, None] & keep[None, :]
    exists = program.valid[:, None] & inside[None, :]
    return Tile(origin, program.offsets, row, S - start, keep, live, exists)


@triton.jit
def coefficient(
    ptr: tl.tensor | None, program: Program, default: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """Values of a per-channel tensor in `dtype`, `(K, 1)`; `default` where there is none."""
    if ptr is None:
        values = tl.full(program.channel.shape, default, dtype)
    else:
        values = tl.load(ptr + program.channel, mask=program.valid, other=0).to(dtype)
    return values[:, None]


@triton.jit
def coefficients(
    mean_ptr: tl.tensor,
    invstd_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    program: Program,
) -> Coefficients:
    """Loaded, for this program's channels."""
    mean = tl.load(mean_ptr + program.channel, mask=program.valid, other=0)[:, None]
    invstd = coefficient(invstd_ptr, program, 0.0, mean.dtype)
    scale = invstd * coefficient(weight_ptr, program, 1.0, mean.dtype)
    bias = coefficient(bias_ptr, program, 0.0, mean.dtype)
    return Coefficients(mean, invstd, scale, bias)


@triton.jit
def load_tile(ptr: tl.tensor, tile: Tile, dtype: tl.constexpr, LAST_USE: tl.constexpr) -> tl.tensor:
    """The live values of a tile in `dtype`, 0 for the others; LAST_USE lets them leave the cache."""
    policy: tl.constexpr = "evict_first" if LAST_USE else ""
    ptr += tile.origin
    return tl.load(ptr + tile.offsets, mask=tile.live, other=0, eviction_policy=policy).to(dtype)


@triton.jit
def store_tile(ptr: tl.tensor, tile: Tile, values: tl.tensor) -> None:
    """Store the values of a tile that exist, masked ones too, in the dtype of `ptr`."""
    tl.store(ptr + tile.origin + tile.offsets, values, mask=tile.exists)


@triton.jit
def row_bytes(S: tl.tensor) -> tl.tensor:
    """Bytes of a row of S positions in a plane."""
    return (S + 63) // 64 * 8


@triton.jit
def store_bits(
    bits_ptr: tl.tensor, bits: tl.tensor, program: Program, tile: Tile, SHAPE: tl.constexpr
) -> None:
    """Store a bit for each of `bits` `(K, P)`."""
    K: tl.constexpr = SHAPE.K
    P: tl.constexpr = SHAPE.P
    start, _, _ = _bytes(program, tile, SHAPE)
    eight = tl.arange(0, 8)
    if SHAPE.CHANNELS_LAST:
        parts = tl.reshape(bits.to(tl.int32), (K // 8, 8, P)) << eight[None, :, None]
        joined = tl.sum(parts, 1)
        groups = tl.sum(tl.reshape(program.valid.to(tl.int32), (K // 8, 8)), 1) > 0
        offsets = tl.arange(0, K // 8)[:, None] + tl.arange(0, P)[None, :] * (program.C // 8)
        exists = groups[:, None] & (tl.arange(0, P) < tile.remaining)[None, :]
        tl.store(bits_ptr + start + offsets, joined.to(tl.uint8), mask=exists)
    else:
        CHUNK: tl.constexpr = P if P < 64 else 64
        CHUNKS: tl.constexpr = P // CHUNK
        split = tl.reshape(bits.to(tl.int64), (K, CHUNKS, CHUNK // 8, 8))
        bytes_of_eight = tl.sum(split << (eight * 8)[None, None, None, :], 3)
        words = tl.sum(bytes_of_eight << tl.arange(0, CHUNK // 8)[None, None, :], 2)
        chunk = tl.arange(0, CHUNKS)
        offsets = tl.arange(0, K)[:, None] * (row_bytes(program.S) // 8) + chunk[None, :]
        exists = program.valid[:, None] & (chunk * 64 < tile.remaining)[None, :]
        words_ptr = (bits_ptr + start).to(tl.pointer_type(tl.int64))
        tl.store(words_ptr + offsets, words, mask=exists)


@triton.jit
def load_bits(bits_ptr: tl.tensor, program: Program, tile: Tile, SHAPE: tl.constexpr) -> tl.tensor:
    """What `store_bits` stored, `(K, P)`; each value loads its byte, so that bits have the layout of values."""
    start, offsets, bit = _bytes(program, tile, SHAPE)
    joined = tl.load(bits_ptr + start + offsets, mask=tile.live, other=0).to(tl.int32)
    return ((joined >> bit) & 1) != 0


@triton.jit
def _bytes(
    program: Program, tile: Tile, SHAPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The offset of a tile's first byte, of each value's byte from there, and the number of its bit in the byte."""
    channel, position = tl.arange(0, SHAPE.K)[:, None], tl.arange(0, SHAPE.P)[None, :]
    if SHAPE.CHANNELS_LAST:
        start = tile.origin // 8
        offsets = channel // 8 + position * (program.C // 8)
        bit = channel % 8
    else:
        start = tile.row * row_bytes(program.S) + (program.S - tile.remaining) // 8
        offsets = channel * row_bytes(program.S) + position // 64 * 8 + position % 8
        bit = position // 8 % 8
    return start, offsets, bit
