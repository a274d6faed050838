"""How a pass is handed to the library: what it serves, how inputs are laid out, and the words of a call."""

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.operands import Fused

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
MOMENTS, NORMALIZE, BACKWARD_SUMS, BACKWARD_INPUT, BACKWARD_RESIDUAL = range(5)
NOTHING, RESIDUAL, OUTPUT = range(3)

CALL = "8q10P"
"""`Call` in native/kernels_call.h, for `struct`: packing is faster than a ctypes.Structure."""
_CALL = struct.Struct(CALL)


class Layout(NamedTuple):
    """An input as the library sees it: `samples` x `channels` x `size` values, one after the other."""

    samples: int
    channels: int
    size: int
    memory_format: torch.memory_format


class Operands(NamedTuple):
    """What a pass reads beside x, and the affine's four tensors, as addresses; 0 stands for None."""

    mean: int = 0
    invstd: int = 0
    weight: int = 0
    bias: int = 0
    dy: int = 0
    extra: int = 0
    sums: int = 0
    total: int = 0


def packed_call(
    kind: int, x: Tensor, layout: Layout, fused: Fused, operands: Operands, result: int
) -> bytes:
    """The call of one pass over `x`; what its addresses belong to must live until it is done."""
    mean, invstd, weight, bias, dy, extra, sums, total = operands
    return _CALL.pack(
        kind,
        DTYPES[x.dtype],
        *layout[:3],
        torch.get_num_threads(),
        0 if fused.act is None else ACTIVATIONS[fused.act].code,
        OUTPUT if fused.output is not None else RESIDUAL if fused.residual is not None else NOTHING,
        x.data_ptr(),
        dy,
        extra,
        mean,
        invstd,
        weight,
        bias,
        sums,
        total,
        result,
    )


def served(x: Tensor, fused: Fused | None = None, dy: Tensor | None = None) -> bool:
    """Whether the library serves these."""
    dtype = x.dtype
    if (
        dtype not in DTYPES
        or x.numel() == 0
        or not plain_kind(x)
        or (dy is not None and dy.dtype != dtype)
    ):
        return False
    if fused is None:
        return True
    third = extra(fused)
    exotic = fused.mask is not None or (third is not None and third.dtype != dtype)
    return not exotic and not (fused.act == "silu" and dtype == torch.float64)


def plain_kind(x: Tensor) -> bool:
    """Whether `x` is a tensor with memory of its own, rather than a subclass that may have none."""
    return type(x) is Tensor or type(x) is Parameter


def extra(fused: Fused) -> Tensor | None:
    """The third tensor of a pass."""
    return fused.residual if fused.output is None else fused.output


def laid_out(x: Tensor) -> tuple[Tensor, Layout]:
    """`x` without gaps, in its own memory format where that is one."""
    layout = layout_of(x.shape, x.stride())
    return aligned(x, layout), layout


@functools.lru_cache(maxsize=4096)
def layout_of(shape: torch.Size, stride: tuple[int, ...]) -> Layout:
    """How the library sees an input of this shape, not empty, once it has no gaps."""
    samples, channels = shape[:2]
    size = math.prod(shape[2:])
    memory_format = CHANNELS_LAST.get(len(shape))
    # a single channel is both: then it is told by what follows
    if memory_format is not None and stride[1] == 1 and channels > 1 and size > 1:
        return Layout(samples * size, channels, 1, memory_format)
    return Layout(samples, channels, size, torch.contiguous_format)


def aligned(values: Tensor, layout: Layout) -> Tensor:
    """`values` in the order of x, without gaps."""
    if values.is_contiguous(memory_format=layout.memory_format):
        return values
    return values.contiguous(memory_format=layout.memory_format)


def plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`values` as the library takes coefficients."""
    if values is None or (values.dtype == dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


def address(values: Tensor | None) -> int:
    """Where `values` lie; 0 for None."""
    return 0 if values is None else values.data_ptr()
