# pyright: reportArgumentType=false
"""How a Triton program walks an input: in tiles of channels x positions, whatever the memory layout.

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
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Values in a tile: 16 a thread at 4 warps, that is 2 to 4 loads of 128 bits. Awaits measurement on a GPU."""

SCATTERED_TILE = 512
"""Values in a tile whose rows are not aligned, as in planes of 7 x 7: there each value costs registers for an address
of its own, 220 to 249 a thread for 2048 values, 45 to 64 for 512 (read from the machine code for sm_90)."""

RUN = {True: 64, False: 512}
"""Most values of a tile that follow each other in memory, for channels_last and for planes; from 128 bytes on
longer runs gain nothing, and shorter ones leave fewer lanes idle at a plane's end. Awaits measurement on a GPU."""

PROGRAMS_PER_MULTIPROCESSOR = 8
"""32 warps, with enough loads in flight to hide memory's latency. Awaits measurement on a GPU."""

SIZES = ("C", "S", "steps", "steps_per_program", "W")
"""Parameters that are not worth a compilation for being 1 or a multiple of 16: VECTOR says what matters of them."""


class Tiling(NamedTuple):
    """How one launch covers an input.

    Attributes:
        grid: blocks of channels, and programs for each.
        arguments: what every kernel that walks tiles takes after its pointers, in the order of its parameters:
            C, S, steps, steps of a program, tile height K and width P, VECTOR, CHANNELS_LAST.
    """

    grid: tuple[int, int]
    arguments: tuple[int, int, int, int, int, int, int, bool]


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the kernels read `x` in: channels_last where `x` is that and not contiguous."""
    if x.dim() in (4, 5) and not x.is_contiguous():
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def tiling_of(x: Tensor) -> Tiling:
    """How to cover `x` `(N, C, *)`, which is not empty and dense in `memory_format(x)`."""
    num_images, num_channels = x.shape[:2]
    num_positions = x.numel() // (num_images * num_channels)
    channels_last = num_positions == 1 or not x.is_contiguous()
    if channels_last:
        num_images, num_positions = 1, num_images * num_positions
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x)
    return tile(num_images, num_channels, num_positions, channels_last, programs)


@functools.lru_cache(maxsize=4096)
def tile(
    num_images: int, num_channels: int, num_positions: int, channels_last: bool, num_programs: int
) -> Tiling:
    """A tiling with about `num_programs` programs; never more than there are tiles."""
    # Rows of 14 x 14 are not aligned to 16 values but to 4: told so, the compiler still loads vectors.
    vector = gcd(num_channels if channels_last else num_positions, 16)
    values = TILE if vector > 1 else SCATTERED_TILE
    height, width = _tile_shape(num_channels, num_positions, channels_last, values)
    blocks = triton.cdiv(num_channels, height)
    steps = num_images * triton.cdiv(num_positions, width)
    of_a_program = triton.cdiv(steps, max(1, num_programs // blocks))
    sizes = (num_channels, num_positions, steps, of_a_program)
    return Tiling(
        (blocks, triton.cdiv(steps, of_a_program)), (*sizes, height, width, vector, channels_last)
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


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds `x`; 1 of a CPU, where Triton's interpreter runs one program after another."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 1


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
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of a step: its first value, its first position over the batch, positions from there to the image's end."""
    chunks = tl.cdiv(S, P)
    image = step // chunks
    start = (step - image * chunks) * P
    place = image.to(tl.int64) * S + start  # offsets may exceed 32 bits
    channel = tl.program_id(0).to(tl.int64) * K
    origin = channel * (1 if CHANNELS_LAST else S) + start.to(tl.int64) * (
        C if CHANNELS_LAST else 1
    )
    return origin + image.to(tl.int64) * S * C, place, S - start


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
