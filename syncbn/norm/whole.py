"""A whole pass in one call of the native library: of a group of one, or of ranks that share memory.

It computes what the steps in `autograd` and `steps` compute one after another, to the same bits, and exchanges the
same frames, so that one rank may come this way and another not. It spares what lies between the steps: 250 us of
Python a layer and step, which is more than small layers take. What is rare is left to the steps: first exchanges,
replays, empty batches, masks, payloads that no slot holds.
"""

import ctypes
import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.norm import kernels
from syncbn.norm.header import BACKWARD, FORWARD
from syncbn.norm.join import refuse_ddp_join
from syncbn.norm.kernels import EagerKernels, Fused, Running
from syncbn.norm.kernels.call import (
    BACKWARD_INPUT,
    NORMALIZE,
    Operands,
    address,
    aligned,
    extra,
    laid_out,
    packed_call,
    plain,
    served,
)
from syncbn.norm.kernels.cpu import CpuKernels, moved, updatable
from syncbn.norm.kernels.eager import stats_dtype
from syncbn.norm.kernels.results import empty_like
from syncbn.norm.moments import Block, packed_bytes
from syncbn.norm.native import library
from syncbn.norm.replay import Found, replaying
from syncbn.norm.shared import LOOK_NS, SharedMemory
from syncbn.norm.steps import Call, check
from syncbn.norm.wire import PAYLOAD_BYTES

_REST = struct.Struct("2P2qd4P3Pdq")
"""What follows the call in `Whole` of native/whole.cpp."""
_NOTHING_MOVES = (0, 0, 0, 0.0, 0)
_NOBODY = (0, 0, 0)


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
    fused, again = Fused(call.act, residual, call.mask), replaying()
    if not _serves(x, fused, call) or (again and call.exchange is not None):
        return None
    x, layout = laid_out(x)
    dtype = stats_dtype(x.dtype)
    y, block = empty_like(x), Block(layout.channels, dtype)
    third, scale, shift = aligned(extra(fused), layout), plain(weight, dtype), plain(bias, dtype)
    total, own, mean, var, invstd = block.addresses
    operands = Operands(mean, invstd, address(scale), address(shift), 0, address(third))
    words = packed_call(NORMALIZE, x, layout, fused, operands, y.data_ptr())
    moving = _NOTHING_MOVES if again or call.running is None else _moving(call.running)
    meeting = _meeting(FORWARD, x, block.own_bytes, call, needs_grad)
    words += _REST.pack(own, *_words(meeting), call.eps, total, mean, var, invstd, *moving)
    if status := _whole(words, meeting):
        _rest_of_forward(status, words, meeting, block, call, x)
    _follow_up(call, block, again, moving)
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
    if not _serves(x, fused, call, dy):
        return None
    x, layout = laid_out(x)
    dtype = stats_dtype(x.dtype)
    dx, sums = empty_like(x), torch.empty(2, layout.channels, dtype=dtype)
    dz, third = aligned(dy, layout), aligned(extra(fused), layout)
    scale, shift = plain(weight, dtype), plain(bias, dtype)
    total, _, mean, _, invstd = found.addresses
    affine = (mean, invstd, address(scale), address(shift))
    operands = Operands(*affine, address(dz), address(third), 0, total)
    words = packed_call(BACKWARD_INPUT, x, layout, fused, operands, dx.data_ptr())
    meeting = _meeting(BACKWARD, x, sums.nbytes, call, needs_grad=True)
    words += _REST.pack(sums.data_ptr(), *_words(meeting), 0.0, 0, 0, 0, 0, *_NOTHING_MOVES)
    if status := _whole(words, meeting):
        _rest(status, words, meeting, sums.view(-1))
    if call.exchange is not None:
        call.exchange.met(call.serial)
    return dx, sums


def _serves(x: Tensor, fused: Fused, call: Call, dy: Tensor | None = None) -> bool:
    """Whether the library does the whole pass, its exchange included."""
    if not (served(x, fused, dy) and isinstance(kernels.pick(x), CpuKernels)):
        return False
    if call.exchange is None:
        return True
    meets = call.exchange.in_one_call and call.exchange.memory is not None
    return meets and packed_bytes(x.shape[1], x.dtype) <= PAYLOAD_BYTES


def _meeting(kind: int, x: Tensor, size: int, call: Call, needs_grad: bool) -> _Meeting | None:
    """The exchange that comes next, which from here on must take place."""
    if call.exchange is None:
        return None
    if kind == FORWARD:
        refuse_ddp_join(call.name)
    memory = call.exchange.memory
    assert memory is not None
    return _Meeting(memory, *call.exchange.announce(kind, size, **call.place(x, needs_grad)))


def _words(meeting: _Meeting | None) -> tuple[int, int, int]:
    """The ring, the number of the exchange and how long to wait in the call, as in `Whole`."""
    return _NOBODY if meeting is None else (meeting.memory.address, meeting.number, LOOK_NS)


def _moving(running: Running) -> tuple[int, int, int, float, int]:
    """`Moving` of native/kernels_call.h."""
    if not updatable(running):
        return _NOTHING_MOVES
    mean, var, tracked, momentum = running
    weight = -1.0 if momentum is None else momentum
    places = mean.data_ptr(), var.data_ptr(), address(tracked)
    return *places, weight, mean.dtype == torch.float64


def _whole(words: bytes, meeting: _Meeting | None) -> int:
    return _native().syncbn_whole(words, b"" if meeting is None else meeting.header)


def _rest(status: int, words: bytes, meeting: _Meeting | None, own: Tensor) -> Tensor:
    """Bring a pass to its end whose exchange has not ended well at once; what all ranks sent."""
    assert meeting is not None, "a pass without an exchange fails in no exchange"
    memory, header, number = meeting
    gathered = memory.brought(status, header, number, own)
    _native().syncbn_rest(words, gathered.data_ptr())
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


def _follow_up(call: Call, block: Block, again: bool, moving: tuple[float, ...]) -> None:
    """What remains to be done where a forward pass went well."""
    if call.exchange is not None:
        call.exchange.met(call.serial)
        if call.replays is not None:
            call.replays.keep(block)
    if call.running is None or again:
        return
    if moving is _NOTHING_MOVES:
        EagerKernels().update(call.running, block.statistics)
    else:
        moved(call.running)


@functools.cache
def _native() -> ctypes.CDLL:
    """The library with the types of these functions' arguments."""
    found = library()
    assert found is not None, "kernels that need it were picked"
    found.syncbn_whole.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    found.syncbn_rest.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return found
