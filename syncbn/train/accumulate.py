"""Gradient accumulation: one optimiser step from several micro-batches.

A step's global batch is cut into consecutive micro-batches, and each of them is shared out to ranks as a global batch
is without accumulation. So the samples of a step and their order are those of a run with a batch `accumulate` times as
large, and so is the gradient, but for norms: the statistics of a batch norm are those of a micro-batch. A last, smaller
batch of an epoch has as few micro-batches as hold it, of sizes that differ by at most one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from syncbn.sampling import rank_share, share_sizes
from syncbn.structure import cut


def micro_sizes(num_samples: int, micro_batch: int) -> list[int]:
    """Sizes over all ranks of the micro-batches, of at most `micro_batch`, of a step of `num_samples`."""
    return share_sizes(num_samples, -(-num_samples // micro_batch))


def accumulated_share(whole: Tensor, micro_batch: int, rank: int, world_size: int) -> Tensor:
    """The indices of `whole` (n,) that are `rank`'s, micro-batch after micro-batch."""
    parts = whole.split(micro_sizes(len(whole), micro_batch))
    return torch.cat([rank_share(part, rank, world_size) for part in parts])


def accumulate(
    backward: Callable[[Any, Any], Tensor],
    unreduced: Callable[[], AbstractContextManager[Any]],
    own_sizes: list[int],
    x: Any,
    y: Any,
) -> Tensor:
    """Leave the gradient of all micro-batches in `.grad`; this rank's part of the step's summed loss, `()`.

    Args:
        backward: adds the gradient of one micro-batch and returns its summed loss.
        unreduced: within it `backward` reduces no gradients over ranks; the last micro-batch runs outside.
        own_sizes: this rank's samples in each micro-batch.
        x: this rank's samples of the step, micro-batch after micro-batch.
        y: their targets.
    """
    losses = []
    parts = list(zip(cut(x, own_sizes), cut(y, own_sizes), strict=True))
    for part, reduces in zip(parts, _reduces(len(parts)), strict=True):
        with nullcontext() if reduces else unreduced():
            losses.append(backward(*part).detach())
    return sum(losses[1:], losses[0])


def own_sizes(num_samples: int, micro_batch: int, rank: int, world_size: int) -> list[int]:
    """How many samples `rank` has in each micro-batch of a step of `num_samples`."""
    sizes = micro_sizes(num_samples, micro_batch)
    return [share_sizes(size, world_size)[rank] for size in sizes]


def _reduces(num_parts: int) -> Iterator[bool]:
    yield from (part == num_parts - 1 for part in range(num_parts))
