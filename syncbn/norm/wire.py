"""Frames through the process group: the way that always works."""

import weakref
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Transport(Protocol):
    """What brings every rank's frame to every rank."""

    def gather(self, frame: Tensor, size: int, doing: object = "") -> Tensor:
        """Every rank's `frame`, `(k,)`, as `(W, k)`, in rank order.

        Args:
            frame: of any dtype; on every rank at most `size` elements, of which all ranks get this rank's number.
            size: the same on every rank.
            doing: what this rank is doing, as a text, for the message of a wait that takes too long.
        """
        ...


class Wire:
    """One `all_gather` of the group, padded to `size`.

    The group is held weakly: a group that outlives `destroy_process_group` takes the process down at its exit.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_process_group_ranks(group)

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def timeout_s(self) -> float:
        """The longest wait that the group allows on the CPU, in seconds."""
        group = self._group()
        assert group is not None, "the group was destroyed"
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    def gather(self, frame: Tensor, size: int, doing: object = "") -> Tensor:
        """Every rank's `frame`; what a rank pads with is not looked at."""
        del doing  # the group has a time limit and words of its own
        padded = frame
        if frame.numel() < size:
            padded = frame.new_zeros(size)
            padded[: frame.numel()] = frame
        gathered = frame.new_empty(self.world_size * size)
        dist.all_gather_into_tensor(gathered, padded, group=self._group())
        return gathered.view(self.world_size, size)[:, : frame.numel()]
