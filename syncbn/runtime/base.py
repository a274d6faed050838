"""The `Runtime` protocol, and the runtime of a process alone.

A runtime is a world of ranks with the few collectives the training loop needs. Each is written so that a world
of one does no communication at all, which lets one rank of a larger job also run a trial by itself.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Runtime(Protocol):
    """This process's place in a world of ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over ranks, in place; every rank gets the same bits."""
        ...

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """`sum` of float64 numbers `(n,)`; what it returns waits for it, where that takes time."""
        ...

    def from_main(self, values: Tensor) -> Tensor:
        """`values` of rank 0, in place on every rank."""
        ...

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's `values` (n,), in the order of ranks; n may differ."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def post(self, key: str, text: str) -> None:
        """Let every rank read `text` under `key`, unless one has posted there; no collective, and it never raises."""
        ...

    def posted(self, key: str) -> str | None:
        """What a rank has posted under `key`; None where none has, or where it cannot be read any more."""
        ...

    def solo(self) -> "Solo":
        """This process as a world of one, on the same device."""
        ...

    def close(self) -> None:
        """Leave the world; nothing may be called afterwards."""
        ...


class Solo:
    """A world of one."""

    rank = 0
    world_size = 1
    is_main = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sum(self, values: Tensor) -> Tensor:
        """`values`, unchanged."""
        return values

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """`values`, unchanged, at once."""
        return lambda: values

    def from_main(self, values: Tensor) -> Tensor:
        """`values`, unchanged."""
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """`values` alone."""
        return [values]

    def barrier(self) -> None:
        """Return at once."""

    def post(self, key: str, text: str) -> None:
        """Nobody else would read it."""

    def posted(self, key: str) -> str | None:
        """Nobody else posts."""
        del key
        return None

    def solo(self) -> "Solo":
        """This runtime itself."""
        return self

    def close(self) -> None:
        """Nothing to leave."""
