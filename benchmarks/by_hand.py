"""The training loop that one writes by hand: DistributedDataParallel, a permutation an epoch, and nothing else."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def steps(
    network: nn.Module, images: Tensor, labels: Tensor, per_rank_batch: int, lr: float
) -> Iterator[Tensor]:
    """Train `network` on this rank's share of each batch, a step whenever the next is asked for; yields its loss.

    Args:
        network: with torch's batch norm; it is converted.
        images: float32 (N, C, H, W).
        labels: int64 (N,).
        per_rank_batch: samples a rank.
        lr: of SGD with momentum 0.9.
    """
    rank, batch = dist.get_rank(), per_rank_batch * dist.get_world_size()
    # Synchronised statistics are equal on all ranks, so nobody who knows it has them broadcast at each step.
    model = DistributedDataParallel(
        syncbn.convert_sync_batchnorm(network),
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
    loss_of = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(rank * per_rank_batch, len(labels) - batch + 1, batch):
            own = order[start : start + per_rank_batch]
            optimizer.zero_grad()
            loss = loss_of(model(images[own]), labels[own])
            loss.backward()
            optimizer.step()
            yield loss.detach()
