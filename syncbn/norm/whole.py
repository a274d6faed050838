"""A whole pass in one call of the native library: of a group of one, or of ranks that share memory; in two of others.

It computes what the steps in `autograd` and `steps` compute one after another, to the same bits, and exchanges the
same frames, so that one rank may come this way and another not. It spares what lies between the steps: 250 us of
Python a layer and step, which is more than small layers take. Where ranks share no memory the first call ends before
the exchange, and a second one does the rest. What is rare is left to the steps: first exchanges, replays, empty
batches, masks, payloads that no slot holds or that are reduced.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.norm.exchange import Exchange
from syncbn.norm.header import BACKWARD, FORWARD
from syncbn.norm.join import refuse_ddp_join
from syncbn.norm.kernels import EagerKernels, Fused
from syncbn.norm.kernels.call import (
    BACKWARD_INPUT,
    CALL,
    NORMALIZE,
    NOTHING,
    OUTPUT,
    RESIDUAL,
    address,
    aligned,
    extra,
    plain,
    plain_kind,
)
from syncbn.norm.kernels.choice import chosen
from syncbn.norm.kernels.cpu import NOTHING_MOVES, CpuKernels, moved, moving_words
from syncbn.norm.kernels.form import Form, form_of
from syncbn.norm.kernels.results import empty_like
from syncbn.norm.moments import Block
from syncbn.norm.native import library
from syncbn.norm.replay import Found, replaying
from syncbn.norm.shared import LOOK_NS
from syncbn.norm.steps import Call, check
from syncbn.norm.wire import PAYLOAD_BYTES

_WHOLE = struct.Struct(CALL + "2P2qd4P3Pdq")
"""`Whole` of native/whole.cpp."""


class _Meeting(NamedTuple):
    """The exchange inside a pass."""

    exchange: Exchange
    ring: int
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
    form, again, running = (
        form_of(x.shape, x.stride(), x.dtype, call.act),
        replaying(),
        call.running,
    )
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
    ring, number = (0, 0) if meeting is None else (meeting.ring, meeting.number)
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
    form, third = form_of(x.shape, x.stride(), x.dtype, fused.act), extra(fused)
    if form is None or dy.dtype is not x.dtype or not _serves(x, form, call, third):
        return None
    dtype, x, dy = form.dtype, aligned(x, form.layout), aligned(dy, form.layout)
    third = None if third is None else aligned(third, form.layout)
    scale, shift = plain(weight, dtype), plain(bias, dtype)
    dx, sums = empty_like(x), torch.empty(2, form.channels, dtype=dtype, device="cpu")
    total, _, mean, _, invstd = found.addresses
    meeting = _meeting(BACKWARD, x, form.sums_bytes, call, needs_grad=True)
    ring, number = (0, 0) if meeting is None else (meeting.ring, meeting.number)
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


def _serves(x: Tensor, form: Form, call: Call, third: Tensor | None) -> bool:
    """Whether the library does the whole pass, its exchange included."""
    exotic = call.mask is not None or (third is not None and third.dtype is not x.dtype)
    if exotic or not plain_kind(x) or not isinstance(chosen(x.device.type), CpuKernels):
        return False
    exchange = call.exchange
    if exchange is None:
        return True
    if exchange.ring is None or not exchange.in_one_call:
        return False
    return (
        form.own_bytes <= PAYLOAD_BYTES
        if exchange.memory
        else exchange.gathers(form.own_bytes, form.dtype)
    )


def _meeting(kind: int, x: Tensor, size: int, call: Call, needs_grad: bool) -> _Meeting | None:
    """The exchange that comes next, which from here on must take place."""
    exchange = call.exchange
    if exchange is None:
        return None
    if kind == FORWARD:
        refuse_ddp_join(call.name)
    ring = exchange.ring
    assert ring is not None, "ranks that have not met go step by step"
    header, number = exchange.announce(
        kind,
        size,
        layer=call.name,
        channels=x.shape[1],
        dtype=x.dtype,
        needs_grad=needs_grad,
        serial=call.serial,
    )
    return _Meeting(exchange, ctypes.addressof(ring), header, number)


def _rest(status: int, words: bytes, meeting: _Meeting | None, own: Tensor) -> tuple[Tensor, int]:
    """Bring a pass to its end whose exchange has not ended well at once; what all ranks sent, and what is wrong."""
    assert meeting is not None, "a pass without an exchange fails in no exchange"
    exchange, _, header, number = meeting
    memory, transport = exchange.memory, exchange.transport
    if memory is not None:
        gathered = memory.brought(status, header, number, own)
    else:
        assert transport is not None
        gathered = transport.gather(header, number, own)
    return gathered, _native_rest()(words, gathered.data_ptr())


def _rest_of_forward(
    status: int, words: bytes, meeting: _Meeting | None, block: Block, call: Call, x: Tensor
) -> None:
    """The same, and the error where there is nothing to normalise with."""
    packed, unusable = block.own.unsqueeze(0), status
    if meeting is not None:
        packed, unusable = _rest(status, words, meeting, block.own)
        meeting.exchange.met(call.serial)
    if unusable:
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
