"""The transports by which an exchange reaches the other ranks; `comm.rendezvous` chooses one for a group."""

from typing import Protocol

from torch import Tensor


class Transport(Protocol):
    """Carries every rank's values to every rank, one exchange at a time."""

    def exchange(self, header: bytes, number: int, payload: Tensor) -> Tensor:
        """Every rank's `payload` `(k,)` as `(W, k)` in rank order, after comparing headers and sequence numbers.

        Raises:
            RanksDisagree: on every rank where they differ; or where a rank does not come.
            RankLost: a rank exited.
        """
        ...
