"""What crosses between ranks: one collective forward, one backward, each carrying its own header.

Decisions:

* **One gather each way.** Every rank gets every rank's values and combines them in rank order, so all ranks
  compute the same bits, and on gloo a gather is faster than a reduction (290 us against 560 us, 2 ranks).
* **Ranks of one machine need no socket**: where all ranks of a CPU group can map one piece of memory, frames
  go through it (`shared`), else through the group (`wire`). `SYNCBN_EXCHANGE=gloo` forces the latter.
* **The first frame on a CPU group has the same size whatever the layer**: gloo aborts the process when sizes differ,
  and returns garbage when only dtypes do. The header in it is compared before a value is used; what does not
  fit follows in further frames, whose sizes all ranks have then agreed on.
* **A rank that cannot take part says so in its frame**, so that the others raise instead of waiting.
* On CUDA the values alone are gathered, at their exact size: comparing headers on the host would stall it.
"""

import os
import weakref
from contextlib import suppress

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.norm.header import BACKWARD, FAILED, FORWARD, HEADER, Header
from syncbn.norm.shared import SharedMemory
from syncbn.norm.wire import Transport, Wire

__all__ = ["BACKWARD", "FORWARD", "Exchange", "RanksDisagree", "exchange_of"]

PAYLOAD_BYTES = 4 * (2 * 2048 + 2)
"""Count, mean and M2 of 2048 channels in float32: every layer of a ResNet-50 fits one frame."""

FRAME_BYTES = HEADER.size + PAYLOAD_BYTES


class RanksDisagree(RuntimeError):
    """Ranks met in one exchange with different layers, shapes, dtypes or modes, or one of them failed."""

    exit_code = 5


class Exchange:
    """The exchanges of one process group, numbered in the order in which this rank enters them."""

    def __init__(self, group: ProcessGroup) -> None:
        self._wire = Wire(group)
        self._frames: Transport | None = None
        self._calls = 0

    def gather(
        self,
        values: Tensor,
        *,
        kind: int,
        layer: str,
        channels: int,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`, after comparing what the ranks are doing.

        Raises:
            RanksDisagree: on every rank, when any two ranks' headers differ.
        """
        self._calls += 1
        if values.is_cuda:
            return self._wire.gather(values, values.numel())
        payload = values.contiguous().view(torch.uint8)
        header = Header(kind, self._calls, channels, dtype, needs_grad, payload.numel(), layer)
        return self._gather_frames(header, payload).view(values.dtype)

    def fail(self, message: str) -> None:
        """Tell the ranks that wait in the next exchange, on a CPU group, that this one cannot take part."""
        self._calls += 1
        header = Header(FAILED, self._calls, 0, torch.float32, False, 0, message[:80])
        with suppress(RanksDisagree):  # the caller is about to raise its own, better message
            self._gather_frames(header, torch.empty(0, dtype=torch.uint8))

    def _gather_frames(self, header: Header, payload: Tensor) -> Tensor:
        """Payloads of all ranks, `(W, bytes)`."""
        if self._frames is None:
            self._frames = _transport(self._wire)
        front = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        first, *rest = payload.split(PAYLOAD_BYTES)
        frames = self._frames.gather(torch.cat([front, first]), FRAME_BYTES, header)
        headers = frames[:, : HEADER.size]
        if not torch.equal(headers, headers[:1].expand_as(headers)):
            self._raise_difference([bytes(h.tolist()) for h in headers])
        parts = [frames[:, HEADER.size :]]
        parts += [self._frames.gather(part, part.numel(), header) for part in rest]
        return torch.cat(parts, dim=1)

    def _raise_difference(self, packed: list[bytes]) -> None:
        """Name this rank's place and that of a rank elsewhere, one that failed before all others."""
        own, ranks = self._wire.rank, self._wire.ranks
        headers = [Header.unpack(header) for header in packed]
        others = [rank for rank, header in enumerate(packed) if header != packed[own]]
        other = next((r for r in others if headers[r].kind == FAILED), others[0])
        raise RanksDisagree(
            f"rank {ranks[own]} {headers[own]}; rank {ranks[other]} {headers[other]}: "
            "every rank must run the same layers in the same order and mode"
        )


def _transport(wire: Wire) -> Transport:
    """Shared memory where all ranks can map it, else the group itself; collective at the first call.

    Raises:
        ValueError: `SYNCBN_EXCHANGE` is neither auto, gloo nor shared.
    """
    choice = os.environ.get("SYNCBN_EXCHANGE", "auto")
    if choice not in ("auto", "gloo", "shared"):
        raise ValueError(f"SYNCBN_EXCHANGE={choice!r} is not allowed: auto, gloo or shared")
    # Every rank takes part, also one that wants no memory: ranks that choose differently must agree too.
    memory = SharedMemory.shared_over(wire, FRAME_BYTES, willing=choice != "gloo")
    if memory is None and choice == "shared":
        raise RuntimeError(
            "SYNCBN_EXCHANGE=shared, but the ranks of this group cannot share memory"
        )
    return memory or wire


_exchanges: weakref.WeakKeyDictionary[ProcessGroup, Exchange] = weakref.WeakKeyDictionary()


def exchange_of(group: ProcessGroup) -> Exchange:
    """The one `Exchange` of `group` in this process."""
    if group not in _exchanges:
        _exchanges[group] = Exchange(group)
    return _exchanges[group]
