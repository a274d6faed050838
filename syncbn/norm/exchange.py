"""What crosses between ranks: one collective forward, one backward, each carrying its own header.

Decisions:

* **One gather each way.** Every rank gets every rank's values and combines them in rank order, so all ranks
  compute the same bits, and on gloo a gather is faster than a reduction (290 us against 560 us, 2 ranks).
* **Unless there are many ranks**: where a rank would receive more than 1 MiB, or on CUDA from more than 16, float64
  sums are reduced instead (`sums`). float64 inputs are always gathered: sums of squares would cost them
  their precision.
* **Ranks of one machine need no socket**: where all ranks of a CPU group can map one piece of memory, frames
  go through it (`shared`).
* **Few ranks elsewhere need no thread of gloo's**: up to 8 whose machines can connect read each other's frames from
  sockets of their own (`mesh`), else all go through the group (`wire`). `SYNCBN_EXCHANGE` demands one of the three.
* **A rank that cannot take part says so in its frame**, so that the others raise instead of waiting; one that does
  not come is missed soon where it shares memory with the others (`patrol`), else at the group's time limit; one
  that ended, at once.
* On CUDA the values alone are exchanged, at their exact size: comparing headers on the host would stall it.
* **Whoever wants to know what it costs is told** (`observe`); while nobody does, it costs one test a layer.
"""

import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NotRequired, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.norm import sums, wire
from syncbn.norm.arrival import Arrival
from syncbn.norm.header import (
    BACKWARD,
    FAILED,
    FORWARD,
    NAMED,
    TEXT_BYTES,
    RankLost,
    RanksDisagree,
    Serials,
    packed,
)
from syncbn.norm.mesh import MESH_RANKS, Mesh
from syncbn.norm.shared import Ring, SharedMemory, ring_of
from syncbn.norm.wire import Transport, Wire

__all__ = ["BACKWARD", "FORWARD", "Exchange", "RankLost", "RanksDisagree", "exchange_of", "observe"]

Observer = Callable[[str, int, int, float], None]
"""Told of a layer's exchange: the layer, FORWARD or BACKWARD, the bytes of this rank's values, and the seconds."""

_NOTHING = torch.empty(0, dtype=torch.uint8)


class Place(TypedDict):
    """What the ranks of one exchange must agree on, beside its direction and number.

    Attributes:
        layer: its name, or a text for one without a name.
        channels: C.
        dtype: of the layer's input.
        needs_grad: whether a backward pass may follow.
        serial: of a layer without a name, its place in the order in which this process built layers; -1 for
            one with a name.
    """

    layer: str
    channels: int
    dtype: torch.dtype
    needs_grad: bool
    serial: NotRequired[int]


class Exchange:
    """The exchanges of one process group, numbered in the order in which this rank enters them."""

    in_one_call = True
    """Whether a pass may do its exchange within a native call (`whole`)."""

    def __init__(self, group: ProcessGroup) -> None:
        self._wire = Wire(group)
        self._arrival = Arrival(self._wire)
        self._transport: Transport | None = None
        self.world_size = self._wire.world_size
        self.memory: SharedMemory | None = None
        """What the ranks share, once they have met and found that they can."""
        self.ring: Ring | None = None
        """What a native call must know of the group, once its ranks have met."""
        self._serials = Serials()
        self._calls = 0

    def gather(self, values: Tensor, *, kind: int, **place: Unpack[Place]) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`, after comparing what the ranks are doing (CPU).

        Raises:
            RanksDisagree: on every rank, when any two ranks' headers differ; where a rank does not come.
            RankLost: a rank has ended.
        """
        if values.is_cuda:
            return self._wire.all_gather(values)
        payload = values.contiguous()
        header, number = self.announce(kind, payload.nbytes, **place)
        transport = self._transport or self._connect(header)
        gathered = transport.gather(header, number, payload)
        self.met(place.get("serial", NAMED))
        return gathered

    def announce(
        self,
        kind: int,
        size: int,
        *,
        layer: str,
        channels: int,
        dtype: torch.dtype,
        needs_grad: bool,
        serial: int = NAMED,
    ) -> tuple[bytes, int]:
        """The header of an exchange of `size` bytes that takes place next (CPU), and its number."""
        code = self._serials.code(serial)
        self._calls += 1
        return packed(kind, code, channels, dtype, needs_grad, size, layer), self._calls

    def met(self, serial: int) -> None:
        """Note that the exchange announced last has taken place, with all ranks in one layer."""
        self._serials.keep(serial)
        if self.memory is not None:
            self.memory.forget()

    def moments(self, packed: Tensor, **place: Unpack[Place]) -> Tensor:
        """Packed moments that merge into those of all ranks: theirs, `(W, 2 + 2C)`, or one for all, `(1, 2 + 2C)`.

        Args:
            packed: this rank's, `(2 + 2C,)`, see `syncbn.norm.moments`.
            **place: see `Place`; errors as in `gather`.
        """
        if not self._too_wide(packed):
            return self.gather(packed, kind=FORWARD, **place)
        self._agree(packed, FORWARD, place)
        return sums.to_packed(self._wire.all_reduce(sums.of_packed(packed))).to(packed.dtype)

    def sums(self, values: Tensor, **place: Unpack[Place]) -> Tensor:
        """The sum of every rank's `values` `(2, C)`; the same bits on each. For `place` and errors see `gather`."""
        return sums.in_order(self.addends(values, **place)).view_as(values)

    def addends(self, values: Tensor, **place: Unpack[Place]) -> Tensor:
        """Rows that `sums` adds up in order: every rank's values, `(W, 2C)`, or their sum, `(1, 2C)`."""
        values = values.flatten()
        if not self._too_wide(values):
            return self.gather(values, kind=BACKWARD, **place)
        self._agree(values, BACKWARD, place)
        return self._wire.all_reduce(values.to(torch.float64)).to(values.dtype).unsqueeze(0)

    def fail(self, message: str) -> None:
        """Tell the ranks that wait in the next exchange, on a CPU group, that this one cannot take part."""
        text = message.encode()[:TEXT_BYTES].decode(errors="ignore")
        with suppress(RuntimeError):  # the caller is about to raise its own, better message
            self.gather(
                _NOTHING, kind=FAILED, layer=text, channels=0, dtype=torch.float32, needs_grad=False
            )

    def pass_by(self, layer: str, backward: bool = False) -> None:
        """Note, at next to no cost, that this rank goes through `layer` in eval mode, without an exchange.

        To be called where gradients are enabled, in the forward pass and again in the backward pass. Other ranks that
        wait for this one then know why it does not come. It does nothing once the group is known to share no memory.

        Raises:
            RanksDisagree: in a backward pass, where another rank waits in the forward pass of a layer that this
                rank, unlike that one, has gone through in eval mode since their last exchange.
        """
        (self._transport or self._arrival).pass_by(layer, backward)

    def brought(self, status: int, header: bytes, number: int, own: Tensor) -> Tensor:
        """Every rank's `own` `(k,)` as `(W, k)`, where a native call came back from the exchange without them.

        Args:
            status: what it came back with.
            header: announced for this exchange, as is `number`; errors as in `gather`.
            number: of the exchange.
            own: what this rank sends.
        """
        if self.memory is not None:
            return self.memory.brought(status, header, number, own)
        assert self._transport is not None, "ranks that have not met go step by step"
        return self._transport.gather(header, number, own)

    def _connect(self, header: bytes) -> Transport:
        """Choose the transport; collective at the first exchange."""
        self._arrival.wait(header, self._calls)
        self.memory, mesh = _ways(self._wire)
        self._transport = self.memory or mesh or self._wire
        self.ring = self.memory.ring if self.memory else ring_of(self._wire)
        self._arrival.leave()
        return self._transport

    def gathers(self, size: int, dtype: torch.dtype) -> bool:
        """Whether `size` bytes a rank of `dtype` are gathered, on a CPU, rather than reduced; the same on all ranks."""
        exact = dtype == torch.float64 or self.memory is not None
        return exact or size * self._wire.world_size <= wire.GATHER_BYTES

    def _too_wide(self, values: Tensor) -> bool:
        """Whether a reduction moves less than a gather; the same on all ranks that are in the same place."""
        if values.is_cuda:
            return values.dtype != torch.float64 and self._wire.world_size > wire.GATHER_RANKS
        return not self.gathers(values.nbytes, values.dtype)

    def _agree(self, values: Tensor, kind: int, place: Place) -> None:
        """Compare what the ranks are doing, in a gather of its own; on CUDA nothing is compared."""
        if not values.is_cuda:
            self.gather(_NOTHING, kind=kind, **place)


class _Observed(Exchange):
    """The very same exchange as another, whose layers' meetings `tell` is told of."""

    in_one_call = False  # there it could not be told from the rest of the pass

    def __init__(self, exchange: Exchange, tell: Observer) -> None:
        self.__dict__ = exchange.__dict__
        self._tell = tell

    def moments(self, packed: Tensor, **place: Unpack[Place]) -> Tensor:
        """As of `Exchange`, and timed."""
        started = time.perf_counter()
        everyones = super().moments(packed, **place)
        self._tell(place["layer"], FORWARD, packed.nbytes, time.perf_counter() - started)
        return everyones

    def addends(self, values: Tensor, **place: Unpack[Place]) -> Tensor:
        """As of `Exchange`, and timed."""
        started = time.perf_counter()
        rows = super().addends(values, **place)
        self._tell(place["layer"], BACKWARD, values.nbytes, time.perf_counter() - started)
        return rows


WAYS = ("auto", "shared", "sockets", "gloo")
"""What `SYNCBN_EXCHANGE` may be set to: the best there is, or one of the ways."""


def _ways(wire: Wire) -> tuple[SharedMemory | None, Mesh | None]:
    """What there is beside the group itself: shared memory where all ranks can map it, else connections; collective.

    Raises:
        ValueError: `SYNCBN_EXCHANGE` is not one of `WAYS`.
        RuntimeError: it is a way that some rank cannot go.
    """
    choice = os.environ.get("SYNCBN_EXCHANGE", "auto")
    if choice not in WAYS:
        raise ValueError(f"SYNCBN_EXCHANGE={choice!r} is not allowed: one of {', '.join(WAYS)}")
    # Every rank takes part, also one that wants neither: ranks that choose differently must agree too.
    memory = SharedMemory.over(wire, willing=choice in ("auto", "shared"))
    if memory is None and choice == "shared":
        raise RuntimeError(
            "SYNCBN_EXCHANGE=shared, but the ranks of this group cannot share memory"
        )
    if memory is not None:
        return memory, None
    mesh = Mesh.over(wire, willing=choice in ("auto", "sockets"))
    if mesh is None and choice == "sockets":
        raise RuntimeError(
            f"SYNCBN_EXCHANGE=sockets, but the ranks of this group cannot connect, or are more than {MESH_RANKS}"
        )
    return None, mesh


_exchanges: weakref.WeakKeyDictionary[ProcessGroup, Exchange] = weakref.WeakKeyDictionary()
_observer: Observer | None = None


def observe(tell: Observer | None) -> None:
    """Have `tell` told of every exchange that a layer of this process begins from now on; None ends it.

    A backward pass belongs to its forward pass: it is told of to whoever observed that. The seconds include the wait
    for other ranks; on CUDA they are those of the host, which does not wait.
    """
    global _observer  # one test a layer is all that an exchange pays for it
    _observer = tell


def exchange_of(group: ProcessGroup) -> Exchange:
    """The one `Exchange` of `group` in this process, or another face of it that is observed."""
    exchange = _exchanges.get(group)
    if exchange is None:
        exchange = _exchanges[group] = Exchange(group)
    return exchange if _observer is None else _Observed(exchange, _observer)
