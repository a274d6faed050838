"""A callback that is told of every exchange of a layer: how many bytes, and how long it takes."""

import time
from collections.abc import Callable

from torch import Tensor

from syncbn.norm.comm.fingerprint import Fingerprint

Observer = Callable[[str, int, int, float], None]
"""Told of an exchange: the layer, FORWARD or BACKWARD, the bytes of this rank's values, and the seconds."""

current: Observer | None = None
"""The callback that is set."""


def observe(tell: Observer | None) -> None:
    """Have `tell` told of every exchange that a layer of this process makes from now on; None ends it.

    The seconds include the wait for other ranks; on CUDA they are those of the host, which does not wait.
    """
    global current  # one test a layer is all that an exchange pays for it
    current = tell


def observed(
    exchange: Callable[[Tensor, Fingerprint], Tensor],
    values: Tensor,
    what: Fingerprint,
    direction: int,
) -> Tensor:
    """What `exchange(values, what)` returns, after telling the observer of it."""
    tell = current
    if tell is None:
        return exchange(values, what)
    started = time.perf_counter()
    result = exchange(values, what)
    tell(what.layer, direction, values.nbytes, time.perf_counter() - started)
    return result
