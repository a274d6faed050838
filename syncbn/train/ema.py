"""An exponential moving average of a network's parameters, with which it is evaluated.

After each optimiser step average = decay x average + (1 - decay) x parameter, from the initial weights on, without a
correction for the start. Buffers are not averaged: the averaged network takes them as they are, because the running
statistics of norms are moving averages already, and counts cannot be averaged.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from syncbn.errors import CheckpointError
from syncbn.sharded import shared_out


class Ema:
    """The averages of `model`'s parameters, equal on all ranks as these are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters: list[Tensor] = list(model.parameters())
        self._averages = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters, after a step."""
        torch._foreach_lerp_(self._averages, self._parameters, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages as its parameters within, and its own, bit for bit, afterwards."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        _copy(self._parameters, self._averages)
        try:
            yield
        finally:
            _copy(self._parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters."""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            CheckpointError: it is of another network.
        """
        if list(state) != self._names:
            raise CheckpointError("the checkpoint's averages (train.ema) are of another network")
        _copy(self._averages, map(shared_out, state.values(), self._averages))


@torch.no_grad()
def _copy(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
