"""How an input is cut into tiles of channels x positions, whatever its memory layout.

An input `(N, C, *)` is seen as images of C channels x S positions. For channels_last, and for `(N, C)`, all
positions of the batch form one image, and the two strides change places. So every kernel is written once: grid
axis 0 counts blocks of channels, axis 1 counts programs that share the *steps*, a step being one tile's worth of
positions of one image. Nothing is tuned by timing: that would launch kernels inside a graph capture.
"""

import functools
from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from syncbn.norm.backends.layout import channels_follow, memory_format


class Kind(NamedTuple):
    """How the launches of one kind of kernel are cut.

    Attributes:
        values: in a tile.
        num_warps: that a program has.
        programs: for each multiprocessor, where there are as many tiles.
    """

    values: int
    num_warps: int
    programs: int


MAP = Kind(values=4096, num_warps=8, programs=16)
REDUCTION = Kind(values=2048, num_warps=4, programs=4)
REDUCTION_OF_HALVES = Kind(values=2048, num_warps=8, programs=4)
"""The fastest of 18 to 24 on an H100, in fp32 and bf16, both layouts, over 0.8, 6.4 and 51 million values."""

MANY = 2**24
"""Values from which on planes of two bytes each are reduced by more warps: 76 us for 81, but slower below."""

SCATTERED_TILE = 512
"""Values in a tile whose rows are not aligned, as in planes of 7 x 7: there each value costs registers for an address
of its own, 220 to 249 a thread for 2048 values, 45 to 64 for 512 (read from the machine code for sm_90)."""

RUN = {True: 64, False: 512}
"""Most values of a tile that follow each other in memory, for channels_last and for planes: from 128 bytes on longer
runs gain nothing (128 values for 64: up to 1.4 times slower), and shorter ones idle fewer lanes at a plane's end."""


class Tiling(NamedTuple):
    """How one launch covers an input.

    Attributes:
        grid: blocks of channels, and programs for each.
        sizes: what every kernel that walks tiles takes as its last numbers: C, S, steps, steps of a program.
        shape: and as its first statics: tile height K and width P, VECTOR, CHANNELS_LAST.
        num_warps: that a program has.
    """

    grid: tuple[int, int]
    sizes: tuple[int, int, int, int]
    shape: tuple[int, int, int, bool]
    num_warps: int


class Form(NamedTuple):
    """How inputs of one shape, layout and device are read.

    Attributes:
        memory_format: the layout that the kernels read them in.
        stride: what they then have.
        dense: whether they have it, so that nothing need be copied.
        reduction: how a reduction covers them.
        map: how a map does.
    """

    memory_format: torch.memory_format
    stride: tuple[int, ...]
    dense: bool
    reduction: Tiling
    map: Tiling


def form_of(x: Tensor) -> Form:
    """The form of `x` `(N, C, *)`, which is not empty."""
    return _form(x.shape, x.stride(), x.itemsize, x.device)


@functools.lru_cache(maxsize=4096)
def _form(shape: torch.Size, stride: tuple[int, ...], itemsize: int, device: torch.device) -> Form:
    like = torch.empty_strided(shape, stride, device="meta")
    layout = memory_format(like)
    dense = like.contiguous(memory_format=layout)
    num_images, num_channels = shape[:2]
    num_positions = like.numel() // (num_images * num_channels)
    channels_last = channels_follow(like)
    if channels_last:
        num_images, num_positions = 1, num_images * num_positions
    sizes = (num_images, num_channels, num_positions, channels_last)
    many_halves = itemsize == 2 and like.numel() >= MANY and not channels_last
    reduction = REDUCTION_OF_HALVES if many_halves else REDUCTION
    return Form(
        memory_format=layout,
        stride=dense.stride(),
        dense=like.is_contiguous(memory_format=layout),
        reduction=tile(*sizes, reduction, multiprocessors(device)),
        map=tile(*sizes, MAP, multiprocessors(device)),
    )


def tile(
    num_images: int,
    num_channels: int,
    num_positions: int,
    channels_last: bool,
    kind: Kind,
    num_multiprocessors: int,
) -> Tiling:
    """A tiling with about as many programs as `kind` wants; never more than there are tiles."""
    # Rows of 14 x 14 are not aligned to 16 values but to 4: told so, the compiler still loads vectors.
    vector = gcd(num_channels if channels_last else num_positions, 16)
    values = kind.values if vector > 1 else min(SCATTERED_TILE, kind.values)
    height, width = _tile_shape(num_channels, num_positions, channels_last, values)
    blocks = triton.cdiv(num_channels, height)
    steps = num_images * triton.cdiv(num_positions, width)
    of_a_program = triton.cdiv(steps, max(1, kind.programs * num_multiprocessors // blocks))
    return Tiling(
        grid=(blocks, triton.cdiv(steps, of_a_program)),
        sizes=(num_channels, num_positions, steps, of_a_program),
        shape=(height, width, vector, channels_last),
        num_warps=kind.num_warps,
    )


def _tile_shape(
    num_channels: int, num_positions: int, channels_last: bool, values: int
) -> tuple[int, int]:
    """Channels and positions of a tile of at most `values`, powers of two."""
    most_channels = triton.next_power_of_2(num_channels)
    if channels_last:
        height = min(most_channels, RUN[True])
        return height, min(values // height, triton.next_power_of_2(num_positions))
    longest = max(RUN[False], values // min(most_channels, values))
    width = min(triton.next_power_of_2(num_positions), longest)
    height = min(values // width, most_channels)
    # Offsets inside a tile are 32 bits wide.
    return (height, width) if height * num_positions < 2**31 else (1, width)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere: on a CPU Triton's interpreter runs one program after another."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
