# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
"""A bit a value in Triton, for what takes two values only, laid out as `bits` says."""

import triton
import triton.language as tl


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
    room: tl.tensor,
    known: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Store whether `bits` `(K, P)` are true; for `origin`, `row` and `room` see `triton_tiles.locate`."""
    start, _, _ = _bytes(origin, row, room, C, S, K, P, CHANNELS_LAST)
    eight = tl.arange(0, 8)
    if CHANNELS_LAST:
        parts = tl.reshape(bits.to(tl.int32), (K // 8, 8, P)) << eight[None, :, None]
        joined = tl.sum(parts, 1)
        groups = tl.sum(tl.reshape(known.to(tl.int32), (K // 8, 8)), 1) > 0
        offsets = tl.arange(0, K // 8)[:, None] + tl.arange(0, P)[None, :] * (C // 8)
        exists = groups[:, None] & (tl.arange(0, P) < room)[None, :]
        tl.store(bits_ptr + start + offsets, joined.to(tl.uint8), mask=exists)
    else:
        CHUNK: tl.constexpr = P if P < 64 else 64
        CHUNKS: tl.constexpr = P // CHUNK
        split = tl.reshape(bits.to(tl.int64), (K, CHUNKS, CHUNK // 8, 8))
        bytes_of_eight = tl.sum(split << (eight * 8)[None, None, None, :], 3)
        words = tl.sum(bytes_of_eight << tl.arange(0, CHUNK // 8)[None, None, :], 2)
        chunk = tl.arange(0, CHUNKS)
        offsets = tl.arange(0, K)[:, None] * (row_bytes(S) // 8) + chunk[None, :]
        exists = known[:, None] & (chunk * 64 < room)[None, :]
        words_ptr = (bits_ptr + start).to(tl.pointer_type(tl.int64))
        tl.store(words_ptr + offsets, words, mask=exists)


@triton.jit
def load_bits(
    bits_ptr: tl.tensor,
    live: tl.tensor,
    origin: tl.tensor,
    row: tl.tensor,
    room: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """What `store_bits` stored, `(K, P)`: each value loads its byte, in the very layout of the values."""
    start, offsets, bit = _bytes(origin, row, room, C, S, K, P, CHANNELS_LAST)
    joined = tl.load(bits_ptr + start + offsets, mask=live, other=0).to(tl.int32)
    return ((joined >> bit) & 1) != 0


@triton.jit
def _bytes(
    origin: tl.tensor,
    row: tl.tensor,
    room: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where a tile's first byte lies, where each value's lies from there, and which bit of it is its own."""
    channel, position = tl.arange(0, K)[:, None], tl.arange(0, P)[None, :]
    if CHANNELS_LAST:
        start = origin // 8
        offsets = channel // 8 + position * (C // 8)
        bit = channel % 8
    else:
        start = row * row_bytes(S) + (S - room) // 8
        offsets = channel * row_bytes(S) + position // 64 * 8 + position % 8
        bit = position // 8 % 8
    return start, offsets, bit
