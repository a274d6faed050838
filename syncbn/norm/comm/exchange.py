"""The exchange between the ranks of a group: one collective forward, one backward, each with a header.

Decisions:

* **One gather each way.** Every rank gets every rank's values and combines them in rank order, so all ranks
  compute the same bits, and on gloo a gather is faster than a reduction (290 us against 560 us, 2 ranks).
* **Unless there are many ranks**: where a rank would receive more than 1 MiB, or on CUDA from more than 16, float64
  sums are reduced instead (`moments`). float64 inputs are always gathered: sums of squares would cost them
  their precision.
* **Three transports on CPU groups**: memory that all ranks map, where they share a machine; sockets between up to 8
  ranks whose machines can connect; the process group itself. `SYNCBN_EXCHANGE` demands one of the three.
* **A rank that cannot take part says so in its header**, so that the others raise instead of waiting; why a rank
  does not come is the watchdog's business (`watchdog`).
* On CUDA the values alone are exchanged, at their exact size: comparing headers on the host would stall it.
"""

import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.norm.comm.fingerprint import FAILED, FORWARD, Fingerprint, Serials, packed
from syncbn.norm.comm.groups import GroupSpec, in_parents_group, resolve
from syncbn.norm.comm.rendezvous import connect
from syncbn.norm.comm.transports import Transport, process_group
from syncbn.norm.comm.transports.process_group import PAYLOAD_BYTES, Group
from syncbn.norm.comm.transports.shared_memory import ELSEWHERE, SharedMemory
from syncbn.norm.comm.watchdog import watch
from syncbn.norm.moments import from_sums, has_values, to_sums

_NOTHING = torch.empty(0, dtype=torch.uint8)
Turn = tuple[bytes, int]
"""The header and sequence number of an exchange."""
NO_TURN: Turn = b"", 0


class Exchange:
    """The exchanges of one process group, numbered in the order in which this rank makes them."""

    observer: ClassVar[Callable[[str, int, int, float], None] | None] = None
    """Told of every exchange of a layer: its name, FORWARD or BACKWARD, the bytes of this rank's values, and seconds.

    These include the wait for other ranks; on CUDA they are those of the host, which does not wait.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = Group(group)
        self.world_size, self.group_name = self._group.world_size, self._group.name
        self.transport: Transport | None = None
        """Of a CPU group, from its first exchange on."""
        self.ring_address = ELSEWHERE
        """Of the ring through which a native call exchanges; `ELSEWHERE` before ranks share memory."""
        self.serials = Serials()
        """Of the layers without a name whose exchanges took place; a look into `codes` costs less than a call."""
        self._number = 0
        self._thread = 0
        """That exchanged last, which is the one that the watchdog must look at."""
        watch()

    def combine(self, values: Tensor, direction: int, what: Fingerprint) -> Tensor:
        """Rows of all ranks' packed moments (FORWARD) or sums: every rank's, `(W, k)`, or one for all, `(1, k)`.

        Args:
            values: this rank's, `(k,)`.
            direction: FORWARD or BACKWARD.
            what: see `Fingerprint`.

        Raises:
            RanksDisagree: on every rank, when any two ranks' headers differ; where a rank does not come.
            RankLost: a rank exited.
        """
        observer = Exchange.observer
        started = 0.0 if observer is None else time.perf_counter()
        if not self._is_reduced(values):
            rows = self.gather(values, direction, what)
        else:
            if not values.is_cuda:  # headers are compared, in a gather of their own
                self.gather(_NOTHING, direction, what)
            if direction == FORWARD:
                rows = from_sums(self._group.all_reduce(to_sums(values)))
            else:
                rows = self._group.all_reduce(values.to(torch.float64)).unsqueeze(0)
            rows = rows.to(values.dtype)
        if observer is not None:
            observer(what.layer, direction, values.nbytes, time.perf_counter() - started)
        return rows

    def gather(self, values: Tensor, direction: int, what: Fingerprint) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`, in rank order; for errors see `combine`."""
        if values.is_cuda:
            return self._group.all_gather(values)
        payload = values.contiguous()
        header, number = self.announce(direction, payload.nbytes, what)
        transport = self.transport or self._connect(header)
        gathered = transport.exchange(header, number, payload)
        self.serials.keep(what.serial)
        return gathered

    def fail(self, message: str) -> None:
        """Tell the ranks that wait in the next exchange, on a CPU group, that this one cannot take part."""
        with suppress(RuntimeError):  # the caller is about to raise its own, better message
            self.gather(_NOTHING, FAILED, Fingerprint(message, 0, torch.float32, False))

    def announce_native(self, direction: int, nbytes: int, what: Fingerprint) -> tuple[int, Turn]:
        """The ring's address, and `announce`, of an exchange that a native call does; `NO_TURN` where it does none.

        It does once the ranks share memory, if a slot holds `nbytes`, and while nobody observes.
        """
        elsewhere = self.ring_address == ELSEWHERE or nbytes > PAYLOAD_BYTES
        if elsewhere or Exchange.observer is not None:
            return ELSEWHERE, NO_TURN
        return self.ring_address, self.announce(direction, nbytes, what)

    def announce(self, direction: int, nbytes: int, what: Fingerprint) -> Turn:
        """The header and sequence number of an exchange of `nbytes`, which must take place next (CPU)."""
        self._number += 1
        if self._thread != get_ident():
            self._thread = get_ident()
            watch()
        codes, serial = self.serials.codes, what.serial
        code = codes[serial] if serial in codes else self.serials.code(serial)
        return packed(direction, code, nbytes, what), self._number

    def complete(
        self, own: Tensor, direction: int, what: Fingerprint, status: int, turn: Turn
    ) -> Tensor:
        """`combine`, after a native call that returned a `status` other than 0; `turn` was announced for it."""
        if turn is NO_TURN:
            return self.combine(own, direction, what)
        assert isinstance(self.transport, SharedMemory), "a native call exchanges through memory"
        return self.transport.complete(status, *turn, own)

    def _connect(self, header: bytes) -> Transport:
        """The transport, chosen with all ranks of the group in their first exchange."""
        self.transport = connect(self._group, header, self._number)
        if isinstance(self.transport, SharedMemory):
            self.ring_address = self.transport.address
        return self.transport

    def _is_reduced(self, values: Tensor) -> bool:
        """Whether a reduction moves less than a gather; the same on all ranks that are in the same layer."""
        if values.dtype == torch.float64:
            return False
        if values.is_cuda:
            return self.world_size > process_group.GATHER_RANKS
        shares = self.ring_address != ELSEWHERE
        return not shares and values.nbytes * self.world_size > process_group.GATHER_BYTES


_exchanges: weakref.WeakKeyDictionary[ProcessGroup, Exchange] = weakref.WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_exchanges.clear)


def exchange_of(group: ProcessGroup) -> Exchange:
    """The one `Exchange` of `group` in this process.

    Raises:
        RuntimeError: the process was forked from a rank of `group`.
    """
    exchange = _exchanges.get(group)
    if exchange is None:
        if in_parents_group():
            raise RuntimeError(
                "this process was forked from a rank and is none itself: it cannot exchange statistics in its parent's "
                "process group; evaluate here, or start the process without fork"
            )
        exchange = _exchanges[group] = Exchange(group)
    return exchange


def exchange_for(spec: GroupSpec, x: Tensor) -> Exchange | None:
    """The exchange of the group that `spec` means; None means that no communication is needed.

    That is so in a group of one, and for an `x` that has a shape and no values (a meta or fake tensor).

    Raises:
        ValueError, RuntimeError: see `resolve`.
    """
    # the first test alone costs a layer no call
    has_group = (type(x) is Tensor and not x.is_meta) or has_values(x)
    group = resolve(spec) if has_group else None
    exchange = None if group is None else exchange_of(group)
    return None if exchange is None or exchange.world_size == 1 else exchange
