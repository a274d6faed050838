"""`ddp_buffers_to_ignore`: running statistics, equal on all ranks, that DistributedDataParallel need not broadcast."""

import torch.distributed as dist
from torch import nn

from syncbn.norm.comm.groups import resolve
from syncbn.norm.module import SyncBatchNorm

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def ddp_buffers_to_ignore(model: nn.Module) -> list[str]:
    """The names of the buffers of `model` that are the same bits on every rank after every step.

    These are the running statistics of the synchronised layers whose group is all ranks. Spares
    DistributedDataParallel a broadcast in every forward pass, and keeps its broadcast for the other buffers:

        names = syncbn.ddp_buffers_to_ignore(model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        model = DistributedDataParallel(model)

    It does not broadcast ignored buffers at its construction either: ranks must begin with the same ones.

    Args:
        model: converted, and not yet wrapped. With torch.distributed initialised this resolves the groups of its
            layers, which is a collective where they are given by name or size.
    """
    spanning = {name for name, layer in model.named_modules() if _spans_all_ranks(layer)}
    names = [name.rpartition(".") for name, _ in model.named_buffers()]
    return [
        f"{layer}{dot}{buffer}"
        for layer, dot, buffer in names
        if layer in spanning and buffer in _STATISTICS
    ]


def _spans_all_ranks(layer: nn.Module) -> bool:
    if not isinstance(layer, SyncBatchNorm):
        return False
    if layer.process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return False
    group = resolve(layer.process_group)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return (1 if group is None else group.size()) == world_size
