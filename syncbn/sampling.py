"""Sampling: which samples each step takes, and which rank gets which of them.

The order of samples is a pure function of (seed, step) over the *global* batch, and ranks only divide that batch. So
every world size trains on the same samples in the same order, arms of a comparison stay paired, and a resumed run needs
to know nothing but its step. Dealing samples by class changes the order within a global batch, and so what each rank
gets of it, but not the batch.
"""

import hashlib
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from syncbn.errors import DataError


def require_global_batch(num_samples: int, global_batch: int) -> None:
    """Raise `DataError` where `num_samples` training samples do not fill one global batch."""
    if num_samples < global_batch:
        raise DataError(
            f"the training set has {num_samples} samples, fewer than one global batch of {global_batch} "
            "(train.per_rank_batch x launcher.num_workers x train.accumulate): use a larger set or a smaller batch"
        )


class SampleStream:
    """Global batches of sample indices, in an order reshuffled every epoch; random access by step.

    Args:
        num_samples: samples in the training set.
        global_batch: samples per step over all ranks.
        seed: with the epoch, it alone decides the order.
        drop_last: skip an epoch's last, smaller batch; otherwise it is a step of its own.
        labels: int64 (num_samples,); with them each global batch stands in the order of its samples' classes.

    Raises:
        DataError: fewer samples than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int,
        seed: int,
        drop_last: bool = True,
        labels: Tensor | None = None,
    ) -> None:
        require_global_batch(num_samples, global_batch)
        self._labels = labels
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = num_samples // global_batch
        if not drop_last and num_samples % global_batch:
            self.steps_per_epoch += 1
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """int64 indices (n,) of the global batch of `step`, counted from 0 over all epochs, ordered as ranks cut it."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        indices = self._order_of(epoch)[start : start + self.global_batch]
        return indices if self._labels is None else by_class(indices, self._labels)

    def digest(self) -> str:
        """12 hex digits that tell streams apart: of the first epoch's order, and how it is cut into batches."""
        cut = (self.num_samples, self.global_batch, self.steps_per_epoch, self.seed)
        content = self._order_of(0).numpy().tobytes() + repr(cut).encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def _order_of(self, epoch: int) -> Tensor:
        """The epoch's permutation; the latest is kept, because steps mostly ask in order."""
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            self._epoch, self._order = epoch, torch.from_numpy(order)
        return self._order


def by_class(indices: Tensor, labels: Tensor) -> Tensor:
    """`indices` (n,) in the order of the classes that `labels` (N,) gives them, and as they were within a class.

    Ranks that cut this up get samples of few classes each: their statistics then say which classes those are.
    """
    return indices[labels[indices].argsort(stable=True)]


def rank_share(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """The consecutive part of `indices` (n,) that is `rank`'s; parts differ in size by at most one.

    A batch of fewer samples than ranks leaves some parts empty.
    """
    n = len(indices)
    return indices[_start(n, rank, world_size) : _start(n, rank + 1, world_size)]


def share_sizes(num_samples: int, world_size: int) -> list[int]:
    """How many samples each rank gets from `rank_share` of a batch of `num_samples`."""
    starts = [_start(num_samples, rank, world_size) for rank in range(world_size + 1)]
    return [end - start for start, end in pairwise(starts)]


def _start(num_samples: int, rank: int, world_size: int) -> int:
    return rank * num_samples // world_size
