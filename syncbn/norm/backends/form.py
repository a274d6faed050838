"""What inputs of one shape, layout and dtype have in common, worked out once."""

import functools
from typing import NamedTuple

import torch

from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.aten import stats_dtype
from syncbn.norm.backends.native_call import DTYPES, Layout, layout_of
from syncbn.norm.moments import packed_bytes


class Form(NamedTuple):
    """What a native call over such an input needs.

    Attributes:
        layout: see `layout_of`.
        words: of a call, from the dtype to the channels' size.
        act: the code of the activation.
        channels: C.
        dtype: of the statistics.
        own_bytes: of packed moments.
        sums_bytes: of a backward pass's sums.
    """

    layout: Layout
    words: tuple[int, int, int, int]
    act: int
    channels: int
    dtype: torch.dtype
    own_bytes: int
    sums_bytes: int


@functools.lru_cache(maxsize=4096)
def form_of(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, act: str | None
) -> Form | None:
    """The form of such inputs; None where the library does not serve them."""
    if dtype not in DTYPES or 0 in shape or (act == "silu" and dtype == torch.float64):
        return None
    layout, statistics = layout_of(shape, stride), stats_dtype(dtype)
    return Form(
        layout=layout,
        words=(DTYPES[dtype], *layout[:3]),
        act=0 if act is None else ACTIVATIONS[act].code,
        channels=shape[1],
        dtype=statistics,
        own_bytes=packed_bytes(shape[1], dtype),
        sums_bytes=2 * shape[1] * statistics.itemsize,
    )
