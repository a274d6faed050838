"""How an input is divided into tiles of channels x positions, in any memory layout, and tiles among programs.

An input `(N, C, *)` is read as images of C channels x S positions. For channels_last, and for `(N, C)`, all positions
of the batch form one image, and the two strides swap. So every kernel is written once: grid axis 0 counts blocks of
channels, axis 1 counts programs that share the *steps*, a step being one tile's worth of positions of one image.
Nothing is tuned while it runs: timing would launch kernels inside a graph capture.
"""

import functools
from math import gcd, prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from syncbn.norm.backends.layout import channels_adjacent, memory_format


class Tuning(NamedTuple):
    """How a kind of kernel is launched.

    Attributes:
        values: in a tile.
        num_warps: of a program.
        programs: for each multiprocessor, where there are as many tiles.
    """

    values: int
    num_warps: int
    programs: int


ELEMENTWISE = Tuning(values=4096, num_warps=8, programs=16)
REDUCTION = Tuning(values=2048, num_warps=4, programs=4)
REDUCTION_OF_HALVES = Tuning(values=2048, num_warps=8, programs=4)
"""The fastest of 18 to 24 on an H100, in float32 and bfloat16, both layouts, over 0.8, 6.4 and 51 million values."""

LARGE = 2**24
"""Values from which contiguous half-precision inputs are reduced by more warps: 76 us against 81, but slower below."""

SCATTERED_TILE = 512
"""Values in a tile whose rows are not aligned, as in planes of 7 x 7: there each value costs registers for an address
of its own, 220 to 249 a thread for 2048 values, 45 to 64 for 512 (read from the machine code for sm_90)."""

RUN = {True: 64, False: 512}
"""Most values of a tile that are adjacent in memory, for channels_last and for contiguous inputs: from 128 bytes longer
runs gain nothing (128 values instead of 64: up to 1.4 times slower), and shorter ones idle fewer lanes at a plane's
end."""


class TileShape(NamedTuple):
    """A tile of K channels x P positions; VECTOR divides the size of the axis that is adjacent in memory."""

    K: int
    P: int
    VECTOR: int
    CHANNELS_LAST: bool


class TilePlan(NamedTuple):
    """How one launch covers an input.

    Attributes:
        grid: blocks of channels, and programs for each.
        sizes: the last numbers of every kernel that walks tiles: C, S, steps, steps of a program.
        shape: its first static.
        num_warps: of a program.
    """

    grid: tuple[int, int]
    sizes: tuple[int, int, int, int]
    shape: TileShape
    num_warps: int


class Geometry(NamedTuple):
    """How inputs of one shape, layout and device are read.

    Attributes:
        memory_format: in which the kernels read them.
        stride: in that format.
        dense: whether they have it, so that nothing need be copied.
        reduction: how a reduction covers them.
        elementwise: how an elementwise kernel covers them.
    """

    memory_format: torch.memory_format
    stride: tuple[int, ...]
    dense: bool
    reduction: TilePlan
    elementwise: TilePlan


def geometry_of(x: Tensor) -> Geometry:
    """The geometry of `x` `(N, C, *)`; of an empty one programs have no steps."""
    return _geometry(x.shape, x.stride(), x.itemsize, x.device)


@functools.lru_cache(maxsize=4096)
def _geometry(
    shape: torch.Size, stride: tuple[int, ...], itemsize: int, device: torch.device
) -> Geometry:
    like = torch.empty_strided(shape, stride, device="meta")
    layout = memory_format(like)
    num_images, num_channels = shape[:2]
    num_positions = prod(shape[2:])
    channels_last = channels_adjacent(like)
    if channels_last:
        num_images, num_positions = 1, num_images * num_positions
    sizes = (num_images, num_channels, num_positions, channels_last)
    large_halves = itemsize == 2 and like.numel() >= LARGE and not channels_last
    reduction = REDUCTION_OF_HALVES if large_halves else REDUCTION
    processors = num_multiprocessors(device)
    return Geometry(
        memory_format=layout,
        stride=like.contiguous(memory_format=layout).stride(),
        dense=like.is_contiguous(memory_format=layout),
        reduction=tile_plan(*sizes, reduction, processors),
        elementwise=tile_plan(*sizes, ELEMENTWISE, processors),
    )


def tile_plan(
    num_images: int,
    num_channels: int,
    num_positions: int,
    channels_last: bool,
    tuning: Tuning,
    processors: int,
) -> TilePlan:
    """A plan with about as many programs as `tuning` asks for on `processors`; never more than there are tiles."""
    # Rows of 14 x 14 are not aligned to 16 values but to 4: told so, the compiler still loads vectors.
    vector = gcd(num_channels if channels_last else num_positions, 16)
    values = tuning.values if vector > 1 else min(SCATTERED_TILE, tuning.values)
    height, width = _tile_shape(num_channels, num_positions, channels_last, values)
    blocks = triton.cdiv(num_channels, height)
    steps = num_images * triton.cdiv(num_positions, width)
    steps_per_program = triton.cdiv(max(steps, 1), max(1, tuning.programs * processors // blocks))
    return TilePlan(
        grid=(blocks, max(1, triton.cdiv(steps, steps_per_program))),
        sizes=(num_channels, num_positions, steps, steps_per_program),
        shape=TileShape(height, width, vector, channels_last),
        num_warps=tuning.num_warps,
    )


def _tile_shape(
    num_channels: int, num_positions: int, channels_last: bool, values: int
) -> tuple[int, int]:
    """Channels and positions of a tile of at most `values`, powers of two."""
    most_channels = triton.next_power_of_2(num_channels)
    num_positions = max(1, num_positions)
    if channels_last:
        height = min(most_channels, RUN[True])
        return height, min(values // height, triton.next_power_of_2(num_positions))
    longest = max(RUN[False], values // min(most_channels, values))
    width = min(triton.next_power_of_2(num_positions), longest)
    height = min(values // width, most_channels)
    # Offsets inside a tile are 32 bits wide.
    return (height, width) if height * num_positions < 2**31 else (1, width)


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere: on a CPU Triton's interpreter runs one program after another."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
