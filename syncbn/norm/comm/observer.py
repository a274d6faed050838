"""Exchanges that somebody looks at: how much crosses between ranks, and how long it takes."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack

from torch import Tensor

from syncbn.norm.comm.exchange import BACKWARD, FORWARD, Exchange, Place, show
from syncbn.norm.comm.pending import Pending

Observer = Callable[[str, int, int, float], None]
"""Told of a layer's exchange: the layer, FORWARD or BACKWARD, the bytes of this rank's values, and the seconds."""


def observe(tell: Observer | None) -> None:
    """Have `tell` told of every exchange that a layer of this process begins from now on; None ends it.

    A backward pass belongs to its forward pass: it is told of to whoever observed that. The seconds include the wait
    for other ranks; on CUDA they are those of the host, which does not wait. Of exchanges that are begun and waited for
    later it is told then, and the wait for one that ends because the next begins counts for the next.
    """
    show(None if tell is None else lambda exchange: Observed(exchange, tell))


class Observed(Exchange):
    """The very same exchange as another, whose layers' meetings `tell` is told of."""

    in_one_call = False  # there it could not be told from the rest of the pass

    def __init__(self, exchange: Exchange, tell: Observer) -> None:
        self.__dict__ = exchange.__dict__
        self._tell = tell

    def begin_moments(
        self, packed: Sequence[Tensor], overlap: bool = True, **place: Unpack[Place]
    ) -> Pending[Sequence[Tensor]]:
        """As of `Exchange`, and timed."""
        begin = partial(super().begin_moments, packed, overlap, **place)
        return self._timed(begin, FORWARD, packed, place["layer"])

    def begin_addends(
        self, parts: Sequence[Tensor], overlap: bool = True, **place: Unpack[Place]
    ) -> Pending[Sequence[Tensor]]:
        """As of `Exchange`, and timed."""
        begin = partial(super().begin_addends, parts, overlap, **place)
        return self._timed(begin, BACKWARD, parts, place["layer"])

    def _timed(
        self,
        begin: Callable[[], Pending[Sequence[Tensor]]],
        kind: int,
        values: Sequence[Tensor],
        layer: str,
    ) -> Pending[Sequence[Tensor]]:
        """What `begin` returns; the seconds in which this rank does something else meanwhile do not count."""
        started = time.perf_counter()
        pending = begin()
        begun_s = time.perf_counter() - started

        def end() -> Sequence[Tensor]:
            started = time.perf_counter()
            result = pending.result()
            seconds = begun_s + time.perf_counter() - started
            self._tell(layer, kind, sum(part.nbytes for part in values), seconds)
            return result

        return Pending(end)
