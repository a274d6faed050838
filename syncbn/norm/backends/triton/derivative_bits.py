"""Bits that forward keeps in the place of the output: whether act' is 1, where it has but two values.

Where the channels of a position follow each other in memory, 8 of them share a byte, the first in the lowest bit. In
planes each row has 8 bytes for 64 positions: place p of them is bit p // 8 of byte p % 8, so that 8 that follow each
other lie in 8 bytes that do, in one bit of each, and kernels load them as they load values.
"""

import torch
from torch import Tensor

from syncbn.norm.backends.layout import channels_follow


def empty_bits(x: Tensor) -> Tensor | None:
    """Memory for a bit a value of `x` `(N, C, *)`, not empty; None where 8 values would not share a byte."""
    values = x.numel()
    if channels_follow(x):
        size = 0 if x.shape[1] % 8 else values // 8
    else:
        positions = x[0, 0].numel()
        size = 0 if positions <= 4 else values // positions * 8 * -(-positions // 64)
    return torch.empty(size, dtype=torch.uint8, device=x.device) if size else None


def unpack_bits(bits: Tensor, x: Tensor) -> Tensor:
    """`bits` as 0 and 1 in the shape and dtype of `x`: values on the same side of their kink as y.

    `x` is as kernels read it: contiguous in its memory format.
    """
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if channels_follow(x):
        values = (bits.unsqueeze(1) >> place) & 1
        return values.to(x.dtype).flatten().as_strided(x.shape, x.stride())
    rows = x.shape[0] * x.shape[1]
    values = (bits.view(rows, -1, 1, 8) >> place.unsqueeze(1)) & 1
    return values.to(x.dtype).view(rows, -1)[:, : x[0, 0].numel()].reshape(x.shape)
