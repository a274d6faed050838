"""The memory format in which kernels read an input."""

import math

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which `x` is read: channels_last where `x` is that and not contiguous."""
    if x.dim() in (4, 5) and not x.is_contiguous():
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def channels_adjacent(x: Tensor) -> bool:
    """Whether the channels of a position are adjacent in memory, once `x` `(N, C, *)` is in its memory format."""
    return math.prod(x.shape[2:]) == 1 or memory_format(x) != torch.contiguous_format
