"""Which samples a step takes, and which of them are whose.

One decision shaped this file: the order of samples is a pure function of (seed, step) over the *global* batch,
and ranks only cut that batch up. So every world size trains on the same samples in the same order, arms of a
comparison stay paired, and a resumed run needs to know nothing but its step.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from syncbn.errors import DataError


def require_global_batch(num_samples: int, global_batch: int) -> None:
    """Raise `DataError` where `num_samples` training samples do not fill one global batch."""
    if num_samples < global_batch:
        raise DataError(
            f"the training set has {num_samples} samples, fewer than one global batch of {global_batch} "
            "(train.per_rank_batch x launcher.num_workers): use a larger set or a smaller batch"
        )


class SampleStream:
    """Global batches of sample indices, in an order reshuffled every epoch; random access by step.

    Args:
        num_samples: samples in the training set.
        global_batch: samples per step over all ranks.
        seed: with the epoch, it alone decides the order.
        drop_last: skip an epoch's last, smaller batch; otherwise it is a step of its own.

    Raises:
        DataError: fewer samples than one global batch.
    """

    def __init__(
        self, num_samples: int, global_batch: int, seed: int, drop_last: bool = True
    ) -> None:
        require_global_batch(num_samples, global_batch)
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = num_samples // global_batch
        if not drop_last and num_samples % global_batch:
            self.steps_per_epoch += 1
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """int64 indices (n,) of the whole global batch of `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        return self._order_of(epoch)[start : start + self.global_batch]

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


def rank_share(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """The consecutive part of `indices` (n,) that is `rank`'s; parts differ in size by at most one.

    A batch of fewer samples than ranks leaves some parts empty.
    """
    n = len(indices)
    return indices[rank * n // world_size : (rank + 1) * n // world_size]
