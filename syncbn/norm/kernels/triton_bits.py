# pyright: reportArgumentType=false
"""A bit a value in Triton, for what takes two values only: 8 that follow each other in memory share a byte."""

import triton
import triton.language as tl


@triton.jit
def store_bits(
    bits_ptr: tl.tensor,
    origin: tl.tensor,
    bits: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    known: tl.tensor,
    room: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Store whether `bits` `(K, P)` are true, a byte for each 8 values that follow each other in memory."""
    place = tl.arange(0, 8)
    if CHANNELS_LAST:
        offsets = tl.arange(0, K // 8)[:, None] + tl.arange(0, P)[None, :] * (C // 8)
        groups = tl.sum(tl.reshape(known.to(tl.int32), (K // 8, 8)), 1) > 0
        exists = groups[:, None] & (tl.arange(0, P) < room)[None, :]
        parts = tl.reshape(bits.to(tl.int32), (K // 8, 8, P)) << place[None, :, None]
        joined = tl.sum(parts, 1)
    else:
        offsets = tl.arange(0, K)[:, None] * (S // 8) + tl.arange(0, P // 8)[None, :]
        exists = known[:, None] & (tl.arange(0, P // 8) * 8 < room)[None, :]
        parts = tl.reshape(bits.to(tl.int32), (K, P // 8, 8)) << place[None, None, :]
        joined = tl.sum(parts, 2)
    tl.store(bits_ptr + origin // 8 + offsets, joined.to(tl.uint8), mask=exists)


@triton.jit
def load_bits(
    bits_ptr: tl.tensor, origin: tl.tensor, offsets: tl.tensor, live: tl.tensor
) -> tl.tensor:
    """What `store_bits` stored, `(K, P)`; loading a byte for each bit costs less than dealing out bytes to threads."""
    joined = tl.load(bits_ptr + origin // 8 + offsets // 8, mask=live, other=0).to(tl.int32)
    return ((joined >> (offsets % 8)) & 1) != 0
