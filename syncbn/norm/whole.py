"""A whole pass in one call of the native library: of a group of one, or of ranks that share memory.

It computes what the steps in `autograd` and `steps` compute one after another, to the same bits, and exchanges the
same frames, so that one rank may come this way and another not. It spares what lies between the steps: 250 us of
Python a layer and step, which is more than small layers take. What is rare is left to the steps: first exchanges,
replays, empty batches, masks, payloads that no slot holds.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.norm.header import BACKWARD, FORWARD
from syncbn.norm.join import refuse_ddp_join
from syncbn.norm.kernels import ACTIVATIONS, EagerKernels, Fused
from syncbn.norm.kernels.call import (
    BACKWARD_INPUT,
    CALL,
    DTYPES,
    NORMALIZE,
    NOTHING,
    OUTPUT,
    RESIDUAL,
    Layout,
    address,
    aligned,
    extra,
    layout_of,
    plain,
    plain_kind,
)
from syncbn.norm.kernels.choice import chosen
from syncbn.norm.kernels.cpu import NOTHING_MOVES, CpuKernels, moved, moving_words
from syncbn.norm.kernels.eager import stats_dtype
from syncbn.norm.kernels.results import empty_like
from syncbn.norm.moments import Block, packed_bytes
from syncbn.norm.native import library
from syncbn.norm.replay import Found, replaying
from syncbn.norm.shared import LOOK_NS, SharedMemory
from syncbn.norm.steps import Call, check
from syncbn.norm.wire import PAYLOAD_BYTES

_WHOLE = struct.Struct(CALL + "2P2qd4P3Pdq")
"""`Whole` of native/whole.cpp."""


class _Form(NamedTuple):
    """What inputs of one shape, layout and dtype have in common.

    Attributes:
        layout: see `layout_of`.
        words: the first of `_WHOLE`, up to the channels' size.
        act: the code of the activation.
        channels: C.
        dtype: of the statistics.
        own_bytes: of packed moments.
        sums_bytes: of a backward pass's sums.
        fits: whether they fit one exchange in shared memory.
    """

    layout: Layout
    words: tuple[int, int, int, int]
    act: int
    channels: int
    dtype: torch.dtype
    own_bytes: int
    sums_bytes: int
    fits: bool


class _Meeting(NamedTuple):
    """The exchange inside a pass."""

    memory: SharedMemory
    header: bytes
    number: int


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    needs_grad: bool,
) -> tuple[Tensor, Block] | None:
    """The output and what it was normalised with, running statistics updated; None where this way does not serve.

    Raises:
        NonFiniteStatistics, ValueError: see `steps.forward_statistics`.
    """
    form, again, running = _form(x.shape, x.stride(), x.dtype, call.act), replaying(), call.running
    if (
        form is None
        or not _serves(x, form, call, residual)
        or (again and call.exchange is not None)
    ):
        return None
    dtype, x, third = form.dtype, aligned(x, form.layout), 0
    if residual is not None:
        residual = aligned(residual, form.layout)
        third = residual.data_ptr()
    scale, shift = plain(weight, dtype), plain(bias, dtype)
    y, block = empty_like(x), Block(form.channels, dtype)
    total = block.values.data_ptr()
    own, mean = total + 8, total + 8 + form.own_bytes
    var, invstd = mean + form.sums_bytes // 2, mean + form.sums_bytes
    moving = NOTHING_MOVES if again or running is None else moving_words(running)
    meeting = _meeting(FORWARD, x, form.own_bytes, call, needs_grad)
    ring, number = (0, 0) if meeting is None else (meeting.memory.address, meeting.number)
    words = _WHOLE.pack(
        NORMALIZE,
        *form.words,
        torch.get_num_threads(),
        form.act,
        RESIDUAL if third else NOTHING,
        x.data_ptr(),
        0,
        third,
        mean,
        invstd,
        0 if scale is None else scale.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        0,
        0,
        y.data_ptr(),
        own,
        ring,
        number,
        LOOK_NS,
        call.eps,
        total,
        mean,
        var,
        invstd,
        *moving,
    )
    if status := _native()(words, b"" if meeting is None else meeting.header):
        _rest_of_forward(status, words, meeting, block, call, x)
    if call.exchange is not None:
        call.exchange.met(call.serial)
        if call.replays is not None:
            call.replays.keep(block)
    if running is not None and not again:
        if moving is NOTHING_MOVES:
            EagerKernels().update(running, block.statistics)
        else:
            moved(running)
    return y, block


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
    call: Call,
) -> tuple[Tensor, Tensor] | None:
    """The gradient of x, and this rank's `backward_sums`; None where this way does not serve."""
    form, third = _form(x.shape, x.stride(), x.dtype, fused.act), extra(fused)
    if form is None or dy.dtype is not x.dtype or not _serves(x, form, call, third):
        return None
    dtype, x, dy = form.dtype, aligned(x, form.layout), aligned(dy, form.layout)
    third = None if third is None else aligned(third, form.layout)
    scale, shift = plain(weight, dtype), plain(bias, dtype)
    dx, sums = empty_like(x), torch.empty(2, form.channels, dtype=dtype, device="cpu")
    total, _, mean, _, invstd = found.addresses
    meeting = _meeting(BACKWARD, x, form.sums_bytes, call, needs_grad=True)
    ring, number = (0, 0) if meeting is None else (meeting.memory.address, meeting.number)
    words = _WHOLE.pack(
        BACKWARD_INPUT,
        *form.words,
        torch.get_num_threads(),
        form.act,
        NOTHING if third is None else RESIDUAL if fused.output is None else OUTPUT,
        x.data_ptr(),
        dy.data_ptr(),
        address(third),
        mean,
        invstd,
        0 if scale is None else scale.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        0,
        total,
        dx.data_ptr(),
        sums.data_ptr(),
        ring,
        number,
        LOOK_NS,
        0.0,
        0,
        0,
        0,
        0,
        *NOTHING_MOVES,
    )
    if status := _native()(words, b"" if meeting is None else meeting.header):
        _rest(status, words, meeting, sums.view(-1))
    if call.exchange is not None:
        call.exchange.met(call.serial)
    return dx, sums


@functools.lru_cache(maxsize=4096)
def _form(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, act: str | None
) -> _Form | None:
    """What inputs of this kind have in common; None where the library does not serve them."""
    if dtype not in DTYPES or 0 in shape or (act == "silu" and dtype == torch.float64):
        return None
    layout, statistics = layout_of(shape, stride), stats_dtype(dtype)
    own_bytes = packed_bytes(shape[1], dtype)
    return _Form(
        layout=layout,
        words=(DTYPES[dtype], *layout[:3]),
        act=0 if act is None else ACTIVATIONS[act].code,
        channels=shape[1],
        dtype=statistics,
        own_bytes=own_bytes,
        sums_bytes=2 * shape[1] * statistics.itemsize,
        fits=own_bytes <= PAYLOAD_BYTES,
    )


def _serves(x: Tensor, form: _Form, call: Call, third: Tensor | None) -> bool:
    """Whether the library does the whole pass, its exchange included."""
    exotic = call.mask is not None or (third is not None and third.dtype is not x.dtype)
    if exotic or not plain_kind(x):
        return False
    if not isinstance(chosen(x.device.type), CpuKernels):
        return False
    exchange = call.exchange
    return exchange is None or (form.fits and exchange.in_one_call and exchange.memory is not None)


def _meeting(kind: int, x: Tensor, size: int, call: Call, needs_grad: bool) -> _Meeting | None:
    """The exchange that comes next, which from here on must take place."""
    exchange = call.exchange
    if exchange is None:
        return None
    if kind == FORWARD:
        refuse_ddp_join(call.name)
    memory = exchange.memory
    assert memory is not None
    header, number = exchange.announce(
        kind,
        size,
        layer=call.name,
        channels=x.shape[1],
        dtype=x.dtype,
        needs_grad=needs_grad,
        serial=call.serial,
    )
    return _Meeting(memory, header, number)


def _rest(status: int, words: bytes, meeting: _Meeting | None, own: Tensor) -> Tensor:
    """Bring a pass to its end whose exchange has not ended well at once; what all ranks sent."""
    assert meeting is not None, "a pass without an exchange fails in no exchange"
    memory, header, number = meeting
    gathered = memory.brought(status, header, number, own)
    _native_rest()(words, gathered.data_ptr())
    return gathered


def _rest_of_forward(
    status: int, words: bytes, meeting: _Meeting | None, block: Block, call: Call, x: Tensor
) -> None:
    """The same, and the error where there is nothing to normalise with."""
    own = block.own
    packed = own.unsqueeze(0) if meeting is None else _rest(status, words, meeting, own)
    if call.exchange is not None:
        call.exchange.met(call.serial)
    check(packed, block.statistics, call, x)


@functools.cache
def _native() -> Callable[[bytes, bytes], int]:
    """The library's whole pass."""
    found = library()
    assert found is not None, "kernels that need it were picked"
    found.syncbn_whole.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return found.syncbn_whole


@functools.cache
def _native_rest() -> Callable[[bytes, int], int]:
    """What it leaves where its exchange has not ended well at once."""
    found = library()
    assert found is not None
    found.syncbn_rest.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return found.syncbn_rest
