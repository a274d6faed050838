"""Copies of a run's state in main memory, which stay as they are while training goes on."""

import torch
from torch import Tensor, nn


class HostCopy:
    """Main memory for the copy of a state: allocated for the first, used again for the next.

    Tensors are told apart by their turn, since a run has the same ones in the same order whenever it is saved. Those
    of a GPU are copied to page-locked memory.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._turn = 0

    def rewind(self) -> None:
        """Begin the next copy, which overwrites the one before."""
        self._turn = 0

    @torch.no_grad()
    def copy(self, tensor: Tensor) -> Tensor:
        """The values of `tensor` as they are now, in its shape, dtype and memory format."""
        into = self._for(tensor)
        into.copy_(tensor)
        return nn.Parameter(into, tensor.requires_grad) if type(tensor) is nn.Parameter else into

    def _for(self, tensor: Tensor) -> Tensor:
        turn, self._turn = self._turn, self._turn + 1
        if turn == len(self._tensors):
            self._tensors.append(_like(tensor))
        elif not _fits(self._tensors[turn], tensor):
            self._tensors[turn] = _like(tensor)
        return self._tensors[turn]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)


def _fits(memory: Tensor, tensor: Tensor) -> bool:
    return memory.shape == tensor.shape and memory.dtype == tensor.dtype
