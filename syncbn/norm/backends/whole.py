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

from syncbn.norm.backends import EagerKernels, Fused
from syncbn.norm.backends.choice import chosen
from syncbn.norm.backends.cpu import NOTHING_MOVES, CpuKernels, moved, moving_words
from syncbn.norm.backends.form import Form, form_of
from syncbn.norm.backends.native_call import (
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
from syncbn.norm.backends.result_memory import empty_like
from syncbn.norm.comm.exchange import Exchange
from syncbn.norm.comm.fingerprint import BACKWARD, FORWARD
from syncbn.norm.comm.transports.shared_memory import LOOK_NS
from syncbn.norm.moments import Block
from syncbn.norm.native import library
from syncbn.norm.ops.collectives import Call, check
from syncbn.norm.ops.recompute import Found, replaying
from syncbn.norm.uneven_inputs import refuse_ddp_join

_WHOLE = struct.Struct(CALL + "2P2qd4P3Pdq")
"""`Whole` of native/whole.cpp."""


class Meeting(NamedTuple):
    """The exchange inside a pass.

    Attributes:
        exchange: None where the caller does it.
        ring: address of a `Ring`.
        header: of the exchange, as is `number`.
    """

    exchange: Exchange | None
    ring: int
    header: bytes = b""
    number: int = 0


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
    form, exchange = form_of(x.shape, x.stride(), x.dtype, call.act), call.exchange
    if form is None or not serves(x, call.mask, residual):
        return None
    if exchange is not None and (replaying() or not exchange.native_ring(form.own_bytes)):
        return None
    x, moving = aligned(x, form.layout), moving_of(call)
    operands = coefficients(weight, bias, residual, form)
    y, block = empty_like(x), Block(form.channels, form.dtype)
    meeting = _meeting(FORWARD, x, form.own_bytes, call, needs_grad)
    words = forward_words(x, form, operands, y, block, call.eps, meeting, moving)
    status, packed = native()(words, _header(meeting)), None
    if status and meeting is not None:
        packed, status = _rest(status, words, meeting, block.own)
    if exchange is not None:
        exchange.finished(call.fingerprint(x, needs_grad))
    settle(status, packed, x, block, call, moving)
    return y, block


def settle(
    status: int,
    packed: Tensor | None,
    x: Tensor,
    block: Block,
    call: Call,
    moving: tuple[float, ...],
) -> None:
    """Raise where there was nothing to normalise with; else note what a forward pass found and moved."""
    if status:
        check(block.own.unsqueeze(0) if packed is None else packed, block.statistics, call, x)
    if call.exchange is not None and call.replays is not None:
        call.replays.keep(block)
    if call.running is not None and not replaying():
        if moving is NOTHING_MOVES:
            EagerKernels().update(call.running, block.statistics)
        else:
            moved(call.running)


def moving_of(call: Call) -> tuple[float, ...]:
    """The running statistics that the library moves."""
    return NOTHING_MOVES if call.running is None or replaying() else moving_words(call.running)


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
    form, exchange = form_of(x.shape, x.stride(), x.dtype, fused.act), call.exchange
    if form is None or dy.dtype is not x.dtype or not serves(x, call.mask, extra(fused)):
        return None
    if exchange is not None and not exchange.native_ring(form.sums_bytes):
        return None
    x, dy = aligned(x, form.layout), aligned(dy, form.layout)
    operands = coefficients(weight, bias, extra(fused), form)
    dx, sums = empty_like(x), torch.empty(2, form.channels, dtype=form.dtype, device="cpu")
    meeting = _meeting(BACKWARD, x, form.sums_bytes, call, needs_grad=True)
    words = backward_words(dy, x, form, operands, fused, found, dx, sums, meeting)
    status = native()(words, _header(meeting))
    if status and meeting is not None:
        _rest(status, words, meeting, sums.view(-1))
    if exchange is not None:
        exchange.finished(call.fingerprint(x, needs_grad=True))
    return dx, sums


def coefficients(
    weight: Tensor | None, bias: Tensor | None, third: Tensor | None, form: Form
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias and a pass's third tensor as the library reads them; to be kept until it is done."""
    third = None if third is None else aligned(third, form.layout)
    return plain(weight, form.dtype), plain(bias, form.dtype), third


def serves(x: Tensor, mask: Tensor | None, third: Tensor | None) -> bool:
    """Whether the library does all of a pass, its exchange apart."""
    exotic = mask is not None or (third is not None and third.dtype is not x.dtype)
    return not exotic and plain_kind(x) and isinstance(chosen(x.device.type), CpuKernels)


def _meeting(kind: int, x: Tensor, size: int, call: Call, needs_grad: bool) -> Meeting | None:
    """The exchange that comes next, which from here on must take place."""
    exchange = call.exchange
    if exchange is None:
        return None
    if kind == FORWARD:
        refuse_ddp_join(call.name)
    header, number = exchange.announce(kind, size, call.fingerprint(x, needs_grad))
    return Meeting(exchange, exchange.native_ring(size), header, number)


def _header(meeting: Meeting | None) -> bytes:
    return b"" if meeting is None else meeting.header


def forward_words(
    x: Tensor,
    form: Form,
    operands: tuple[Tensor | None, Tensor | None, Tensor | None],
    y: Tensor | None,
    block: Block,
    eps: float,
    meeting: Meeting | None,
    moving: tuple[float, ...] = NOTHING_MOVES,
) -> bytes:
    """A forward pass as the library takes it."""
    weight, bias, residual = operands
    total = block.values.data_ptr()
    own, mean = total + 8, total + 8 + form.own_bytes
    var, invstd = mean + form.sums_bytes // 2, mean + form.sums_bytes
    affine = (mean, invstd, address(weight), address(bias))
    role = NOTHING if residual is None else RESIDUAL
    places = (x.data_ptr(), 0, address(residual), *affine, 0, 0, address(y), own)
    return _words(NORMALIZE, form, role, places, meeting, eps, (total, mean, var, invstd), moving)


def backward_words(
    dy: Tensor,
    x: Tensor,
    form: Form,
    operands: tuple[Tensor | None, Tensor | None, Tensor | None],
    fused: Fused,
    found: Found,
    dx: Tensor,
    sums: Tensor | None,
    meeting: Meeting | None,
) -> bytes:
    """A backward pass as the library takes it."""
    weight, bias, third = operands
    total, _, mean, _, invstd = found.addresses
    affine = (mean, invstd, address(weight), address(bias))
    role = NOTHING if third is None else RESIDUAL if fused.output is None else OUTPUT
    places = (x.data_ptr(), dy.data_ptr(), address(third), *affine, 0, total, dx.data_ptr())
    return _words(BACKWARD_INPUT, form, role, (*places, address(sums)), meeting)


def _words(
    kind: int,
    form: Form,
    role: int,
    operands: tuple[int, ...],
    meeting: Meeting | None,
    eps: float = 0.0,
    merged: tuple[int, ...] = (0, 0, 0, 0),
    moving: tuple[float, ...] = NOTHING_MOVES,
) -> bytes:
    """A whole pass as the library takes it.

    Args:
        kind: NORMALIZE or BACKWARD_INPUT.
        form: of x.
        role: of the third operand.
        operands: addresses from x to the result, as in `Call`, then of what this rank sends.
        meeting: the exchange inside.
        eps: added to the variance.
        merged: where the total, mean, var and invstd of all ranks go.
        moving: running statistics.
    """
    ring, number = (0, 0) if meeting is None else (meeting.ring, meeting.number)
    static = (kind, *form.words, torch.get_num_threads(), form.act, role)
    return _WHOLE.pack(*static, *operands, ring, number, LOOK_NS, eps, *merged, *moving)


def _rest(status: int, words: bytes, meeting: Meeting, own: Tensor) -> tuple[Tensor, int]:
    """Bring a pass to its end whose exchange has not ended well at once; what all ranks sent, and what is wrong."""
    exchange, _, header, number = meeting
    assert exchange is not None
    gathered = exchange.complete(status, header, number, own)
    return gathered, native_rest()(words, gathered.data_ptr(), gathered.stride(0))


@functools.cache
def native() -> Callable[[bytes, bytes], int]:
    """The library's whole pass."""
    found = library()
    assert found is not None, "kernels that need it were picked"
    found.syncbn_whole.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return found.syncbn_whole


@functools.cache
def native_rest() -> Callable[[bytes, int, int], int]:
    """What it leaves where its exchange has not ended well at once."""
    found = library()
    assert found is not None
    found.syncbn_rest.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
    return found.syncbn_rest
