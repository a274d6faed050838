"""The halves of a pass whose exchange lies between them, a call of the native library each, to the bits of `whole`."""

import ctypes
import functools

from torch import Tensor

from syncbn.norm.backends import Fused
from syncbn.norm.backends.form import form_of
from syncbn.norm.backends.native_call import aligned, extra
from syncbn.norm.backends.result_memory import empty_like
from syncbn.norm.backends.whole import (
    Meeting,
    backward_words,
    coefficients,
    forward_words,
    moving_of,
    native,
    native_rest,
    serves,
    settle,
)
from syncbn.norm.comm.transports.shared_memory import Ring
from syncbn.norm.moments import Block, Found
from syncbn.norm.ops.collectives import Call


def moments(x: Tensor, call: Call) -> Block | None:
    """A block with this rank's moments in it, for `finish`; None where this way does not serve."""
    form = form_of(x.shape, x.stride(), x.dtype, call.act)
    if form is None or not serves(x, call.mask, None):
        return None
    x, block = aligned(x, form.layout), Block(form.channels, form.dtype)
    native()(forward_words(x, form, (None, None, None), None, block, call.eps, _apart(1)), b"")
    return block


def finish(
    x: Tensor,
    block: Block,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
) -> Tensor | None:
    """The output, from the block of `moments` and what the ranks sent; None where this way does not serve.

    Args:
        x: the input of `moments`.
        block: of this pass; it is filled.
        rows: packed moments `(W, 2 + 2C)`, which may be columns of something wider.
        weight: `(C,)`, as is `bias`.
        bias: or None.
        residual: in the shape of `x`, or None.
        call: of this pass; running statistics are updated.

    Raises:
        NonFiniteStatistics, ValueError: see `steps.forward_statistics`.
    """
    form = form_of(x.shape, x.stride(), x.dtype, call.act)
    if form is None or not serves(x, call.mask, residual):
        return None
    x, moving = aligned(x, form.layout), moving_of(call)
    operands, y = coefficients(weight, bias, residual, form), empty_like(x)
    words = forward_words(x, form, operands, y, block, call.eps, _apart(len(rows)), moving)
    status = native_rest()(words, rows.data_ptr(), rows.stride(0))
    settle(status, rows, x, block, call, moving)
    return y


def input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: Fused,
    found: Found,
    rows: Tensor,
) -> Tensor | None:
    """The gradient of x, from `rows` `(W, 2C)` that add up to the sums of all ranks; None as in `finish`."""
    form = form_of(x.shape, x.stride(), x.dtype, fused.act)
    if form is None or dy.dtype is not x.dtype or not serves(x, fused.mask, extra(fused)):
        return None
    x, dy = aligned(x, form.layout), aligned(dy, form.layout)
    operands, dx = coefficients(weight, bias, extra(fused), form), empty_like(x)
    apart = _apart(len(rows))
    words = backward_words(dy, x, form, operands, fused, found, dx, None, apart)
    native_rest()(words, rows.data_ptr(), rows.stride(0))
    return dx


@functools.cache
def _ring(ranks: int) -> Ring:
    return Ring(0, ranks)


def _apart(ranks: int) -> Meeting:
    """An exchange that the caller does, from which one row comes for each of `ranks`."""
    return Meeting(None, ctypes.addressof(_ring(ranks)))
