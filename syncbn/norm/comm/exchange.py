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
* **An exchange may be begun and waited for later**, once what does not depend on it is done. On CPU groups one
  gather is under way at a time: the next exchange waits for it first, on every rank alike.
* On CUDA the values alone are exchanged, at their exact size: comparing headers on the host would stall it.
* **Whoever wants to know what it costs is told** (`observed`); while nobody does, it costs one test a layer.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.norm.comm.arrival import Arrival
from syncbn.norm.comm.fingerprint import (
    BACKWARD,
    FAILED,
    FORWARD,
    NAMED,
    TEXT_BYTES,
    RankLost,
    RanksDisagree,
    Serial,
    Serials,
    packed,
)
from syncbn.norm.comm.pending import Pending
from syncbn.norm.comm.transports import process_group as wire
from syncbn.norm.comm.transports.choice import ways
from syncbn.norm.comm.transports.process_group import Transport, Wire
from syncbn.norm.comm.transports.shared_memory import Ring, SharedMemory, ring_of
from syncbn.norm.moments import add_rows, from_sums, to_sums

__all__ = ["BACKWARD", "FORWARD", "Exchange", "RankLost", "RanksDisagree", "exchange_of", "show"]

_NOTHING = torch.empty(0, dtype=torch.uint8)


class Place(TypedDict):
    """What the ranks of one exchange must agree on, beside its direction and number.

    Attributes:
        layer: its name, or a text for one without a name.
        channels: C.
        dtype: of the layer's input.
        needs_grad: whether a backward pass may follow.
        serial: of a layer without a name, its place in the order in which this process built layers; -1 for
            one with a name. Of several that meet together, all of theirs, unless all have names.
    """

    layer: str
    channels: int
    dtype: torch.dtype
    needs_grad: bool
    serial: NotRequired[Serial]


class Fingerprint(NamedTuple):
    layer: str
    num_channels: int
    dtype: torch.dtype
    needs_grad: bool
    serial: int = NAMED

    def place(self):
        return Place(
            layer=self.layer,
            channels=self.num_channels,
            dtype=self.dtype,
            needs_grad=self.needs_grad,
            serial=self.serial,
        )


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
        self._under_way: Pending[Tensor] | None = None

    def gather_statistics(self, packed, what):
        return self.moments(packed, **what.place())

    def gather_sums(self, s, what):
        return self.addends(s, **what.place())

    @property
    def group_name(self):
        return self._wire.group.group_name

    @property
    def ring_address(self):
        import ctypes

        return ctypes.addressof(self.ring)

    def native_ring(self, nbytes):
        return (
            self.ring_address
            if self.memory is not None and self.in_one_call and nbytes <= wire.PAYLOAD_BYTES
            else 0
        )

    def complete(self, status, header, number, own):
        return self.brought(status, header, number, own)

    def finished(self, what):
        self.met(what.serial)

    def gather(self, values: Tensor, *, kind: int, **place: Unpack[Place]) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`, after comparing what the ranks are doing (CPU).

        Raises:
            RanksDisagree: on every rank, when any two ranks' headers differ; where a rank does not come.
            RankLost: a rank has ended.
        """
        return self._begin(values, kind, False, place).result()

    def _begin(self, values: Tensor, kind: int, overlap: bool, place: Place) -> Pending[Tensor]:
        """`gather`, begun; on CUDA `overlap` lets the stream go on meanwhile, on a CPU the caller always does."""
        if values.is_cuda:
            return Pending(self._wire.begin_gather(values, overlap))
        payload = values.contiguous()
        header, number = self.announce(kind, payload.nbytes, **place)
        transport = self._transport or self._connect(header)
        finish = transport.begin(header, number, payload)
        # a group that is gone must not be kept by an exchange that nobody waits for
        end = partial(_ended, weakref.ref(self), place.get("serial", NAMED), finish)
        self._under_way = Pending(end)
        return self._under_way

    def announce(self, kind, size, what=None, **place):
        return self._announce(kind, size, **(what.place() if what else place))

    def _announce(
        self,
        kind: int,
        size: int,
        *,
        layer: str,
        channels: int,
        dtype: torch.dtype,
        needs_grad: bool,
        serial: Serial = NAMED,
    ) -> tuple[bytes, int]:
        """The header of an exchange of `size` bytes that takes place next (CPU), and its number."""
        if self._under_way is not None:
            self._under_way.result()
        code = self._serials.code(serial)
        self._calls += 1
        return packed(kind, code, channels, dtype, needs_grad, size, layer), self._calls

    def met(self, serial: Serial) -> None:
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
        return self.begin_moments([packed], overlap=False, **place).result()[0]

    def begin_moments(
        self, packed: Sequence[Tensor], overlap: bool = True, **place: Unpack[Place]
    ) -> Pending[Sequence[Tensor]]:
        """`moments` of several layers in one exchange, begun; `place` is that of all of them together."""
        values = _joined(packed)
        if not self._too_wide(values):
            gathered = self._begin(values, FORWARD, overlap, place)
            return gathered.then(lambda rows: _parted(rows, packed))
        self._agree(values, FORWARD, place)
        own = [to_sums(one) for one in packed]
        reduced = Pending(self._wire.begin_reduction(_joined(own), overlap))
        return reduced.then(
            lambda row: [
                from_sums(one[0]).to(values.dtype) for one in _parted(row.unsqueeze(0), own)
            ]
        )

    def sums(self, values: Tensor, **place: Unpack[Place]) -> Tensor:
        """The sum of every rank's `values` `(2, C)`; the same bits on each. For `place` and errors see `gather`."""
        return add_rows(self.addends(values, **place)).view_as(values)

    def addends(self, values: Tensor, **place: Unpack[Place]) -> Tensor:
        """Rows that `sums` adds up in order: every rank's values, `(W, 2C)`, or their sum, `(1, 2C)`."""
        return self.begin_addends([values], overlap=False, **place).result()[0]

    def begin_addends(
        self, parts: Sequence[Tensor], overlap: bool = True, **place: Unpack[Place]
    ) -> Pending[Sequence[Tensor]]:
        """`addends` of several layers in one exchange, begun."""
        parts = [values.flatten() for values in parts]
        values = _joined(parts)
        if not self._too_wide(values):
            rows = self._begin(values, BACKWARD, overlap, place)
        else:
            self._agree(values, BACKWARD, place)
            reduced = Pending(self._wire.begin_reduction(values.to(torch.float64), overlap))
            rows = reduced.then(lambda total: total.to(values.dtype).unsqueeze(0))
        return rows.then(lambda rows: _parted(rows, parts))

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
        return self._transport.begin(header, number, own)()

    def _connect(self, header: bytes) -> Transport:
        """Choose the transport; collective at the first exchange."""
        self._arrival.wait(header, self._calls)
        self.memory, mesh = ways(self._wire)
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


def _ended(
    exchange: "weakref.ref[Exchange]", serial: Serial, finish: Callable[[], Tensor]
) -> Tensor:
    """What `finish` waits for; the exchange that was under way is over."""
    alive = exchange()
    if alive is not None:
        alive._under_way = None
    gathered = finish()
    if alive is not None:
        alive.met(serial)
    return gathered


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _parted(rows: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of `rows` that belong to each of `parts`."""
    return [rows] if len(parts) == 1 else rows.split([part.numel() for part in parts], dim=1)


_exchanges: weakref.WeakKeyDictionary[ProcessGroup, Exchange] = weakref.WeakKeyDictionary()
_face: Callable[[Exchange], Exchange] | None = None


def show(face: Callable[[Exchange], Exchange] | None) -> None:
    """Have `exchange_of` give what `face` makes of an exchange from now on; None ends it."""
    global _face  # one test a layer is all that an exchange pays for it
    _face = face


def exchange_of(group: ProcessGroup) -> Exchange:
    """The one `Exchange` of `group` in this process, or another face of it (`show`)."""
    exchange = _exchanges.get(group)
    if exchange is None:
        exchange = _exchanges[group] = Exchange(group)
    return exchange if _face is None else _face(exchange)


def exchange_for(spec):
    from syncbn.norm.comm.groups import resolve

    group = resolve(spec)
    if group is None:
        return None
    e = exchange_of(group)
    return None if e.world_size == 1 else e
