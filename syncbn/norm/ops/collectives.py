"""The two moments at which a layer meets the other ranks: its statistics, and the sums of its gradients.

Everything else in the layer is one rank's own arithmetic. Each meeting is one exchange, and each gives all ranks the
same bits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.norm.backends import Kernels, Running
from syncbn.norm.comm.exchange import Exchange, Fingerprint
from syncbn.norm.comm.fingerprint import NAMED
from syncbn.norm.moments import Statistics
from syncbn.norm.ops.recompute import Remembered, Replays, replaying
from syncbn.norm.sums import in_order
from syncbn.norm.uneven_inputs import refuse_ddp_join


class NonFiniteStatistics(FloatingPointError):
    """NaN, infinite or too large input on some rank; raised on every rank, running statistics untouched."""

    exit_code = 8


class Call(NamedTuple):
    """One use of a layer: all that is not a differentiable tensor.

    Attributes:
        eps: added to the variance.
        act: a name in `ACTIVATIONS`, or None.
        mask: bool, `(N, 1, *)`, contiguous, or None.
        running: what to update, or None.
        exchange: with the other ranks; None for a group of one.
        name: what error messages call the layer.
        serial: of a layer without a name of its own, when it was built; see `Fingerprint`.
        replays: where replays of this pass will look, or None.
    """

    eps: float
    act: str | None = None
    mask: Tensor | None = None
    running: Running | None = None
    exchange: Exchange | None = None
    name: str = ""
    serial: int = NAMED
    replays: Replays | None = None

    def fingerprint(self, x: Tensor, needs_grad: bool) -> Fingerprint:
        """What all ranks must agree on when they exchange for `x`."""
        return Fingerprint(self.name, x.shape[1], x.dtype, needs_grad, self.serial)


class Reduced(NamedTuple):
    """A backward pass before it meets the other ranks.

    Attributes:
        sums: this rank's `backward_sums`, `(2, C)`.
        dresidual: the residual's gradient, where it is needed.
        finish: dx from what adds up to the sums of all ranks, `(W, 2C)`, row by row.
    """

    sums: Tensor
    dresidual: Tensor | None
    finish: Callable[[Tensor], Tensor]


def forward_statistics(x: Tensor, kernel: Kernels, call: Call, needs_grad: bool) -> Remembered:
    """The statistics over all ranks, as a replay will find them; updates running statistics.

    Raises:
        NonFiniteStatistics: see there; in a group, on CPU.
        ValueError: one value per channel over all ranks.
    """
    own = kernel.moments(x, call.mask)
    known = recalled(own, call)
    return known or merged(own, moments_over_ranks(own, x, call, needs_grad), x, kernel, call)


def recalled(own: Tensor, call: Call) -> Remembered | None:
    """What a pass with these moments found, if this one replays it."""
    if not replaying() or call.replays is None:
        return None
    known = call.replays.recall(own)
    return None if known is None else Remembered(own, known)


def merged(own: Tensor, packed: Tensor, x: Tensor, kernel: Kernels, call: Call) -> Remembered:
    """`forward_statistics` from what the ranks sent."""
    statistics = kernel.merge(packed, call.eps)
    check(packed, statistics, call, x)
    if call.running is not None and not replaying():
        kernel.update(call.running, statistics)
    found = Remembered(own, statistics)
    if call.replays is not None:
        call.replays.keep(found)
    return found


def moments_over_ranks(own: Tensor, x: Tensor, call: Call, needs_grad: bool) -> Tensor:
    """Packed moments that merge into those of all ranks; see `Exchange.gather_statistics`."""
    if call.exchange is None:
        return own.unsqueeze(0)
    refuse_ddp_join(call.name)
    return call.exchange.gather_statistics(own, call.fingerprint(x, needs_grad))


def sums_over_ranks(sums: Tensor, x: Tensor, call: Call) -> Tensor:
    """`sums` `(k, C)` over all ranks, for the gradients of `x`; the same bits on each."""
    if call.exchange is None:
        return sums
    rows = call.exchange.gather_sums(sums, call.fingerprint(x, needs_grad=True))
    return in_order(rows).view_as(sums)


def addends_over_ranks(sums: Tensor, x: Tensor, call: Call) -> Tensor:
    """What adds up to `sums` `(2, C)` over all ranks, row by row; see `Exchange.gather_sums`."""
    if call.exchange is None:
        return sums.view(1, -1)
    return call.exchange.gather_sums(sums, call.fingerprint(x, needs_grad=True))


def check(packed: Tensor, statistics: Statistics, call: Call, x: Tensor) -> None:
    """Raise where there is nothing to normalise with, of what all ranks sent and what it came down to.

    On CUDA looking would stall the host, so it looks only where the shape says that there may be too little.
    """
    if packed.is_cuda:
        if call.mask is not None:
            torch._assert_async(statistics.total != 1)  # pyright: ignore[reportPrivateImportUsage]
            return
        if x.numel() > x.shape[1]:
            return
    # alone, NaN passes through as in torch; among ranks it would reach every one of them
    among_ranks = call.exchange is not None and not packed.is_cuda
    # a sum costs a tenth of looking at each value, and is finite only if each is
    suspect = among_ranks and not math.isfinite(float(statistics.var.sum()))
    if suspect and not bool(torch.isfinite(statistics.var).all()):
        bad = (~torch.isfinite(packed)).any(1).nonzero()
        reduced = len(packed) == 1  # then row 0 is no rank
        where = "on some rank" if reduced or not len(bad) else f"on rank {int(bad[0])} of its group"
        raise NonFiniteStatistics(
            f"SyncBatchNorm {call.name!r}: NaN, infinite or too large input {where}; "
            "running statistics are unchanged"
        )
    if float(statistics.total) == 1:
        raise ValueError(
            f"SyncBatchNorm {call.name!r}: expected more than 1 value per channel over all ranks when training"
        )
