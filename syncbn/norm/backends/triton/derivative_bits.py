"""Bits that forward saves instead of the output: whether act' is 1, for activations whose derivative has two values.

Where the channels of a position are adjacent in memory, 8 of them share a byte, the first in the lowest bit. In planes
each row has 8 bytes for 64 positions: position p of them is bit p // 8 of byte p % 8. So 8 adjacent positions have
adjacent bytes and the same bit in each, and kernels load bits in the layout of values.

Second derivatives unpack bits, so this module stands without Triton.
"""

import torch
from torch import Tensor

from syncbn.norm.backends.layout import channels_adjacent


def empty_bits(x: Tensor) -> Tensor | None:
    """Memory for one bit a value of `x` `(N, C, *)`, not empty; None where bytes would not be filled."""
    values = x.numel()
    if channels_adjacent(x):
        size = 0 if x.shape[1] % 8 else values // 8
    else:
        positions = x[0, 0].numel()
        size = 0 if positions <= 4 else values // positions * 8 * -(-positions // 64)
    return torch.empty(size, dtype=torch.uint8, device=x.device) if size else None


def unpack_bits(bits: Tensor, x: Tensor) -> Tensor:
    """`bits` as 0 and 1 in the shape and dtype of `x`, on the same side of the activation's kinks as y.

    Args:
        bits: see `empty_bits`.
        x: contiguous in its memory format, as the kernels read it.
    """
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if channels_adjacent(x):
        values = (bits.unsqueeze(1) >> shift) & 1
        return values.to(x.dtype).flatten().as_strided(x.shape, x.stride())
    rows = x.shape[0] * x.shape[1]
    values = (bits.view(rows, -1, 1, 8) >> shift.unsqueeze(1)) & 1
    return values.to(x.dtype).view(rows, -1)[:, : x[0, 0].numel()].reshape(x.shape)
