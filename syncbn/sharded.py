"""Tensors of which each rank holds a part (`DTensor`): made whole for a checkpoint, and shared out again.

Everything here leaves plain tensors as they are. So a checkpoint, and what reads and writes it, is the same however the
network was spread over ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def is_sharded(value: object) -> bool:
    """Whether `value` is a tensor of which this rank holds a part; its class is not imported, which takes 0.5 s."""
    return hasattr(value, "full_tensor")


@torch.no_grad()
def whole(value: Any, keep: Callable[[Tensor], Tensor] | None) -> Any:
    """`value` with each sharded tensor in its dicts, lists and tuples made whole; a collective where there is one.

    Args:
        value: the same on all ranks but for their parts.
        keep: what this rank keeps of a tensor, sharded or not, once it is whole; without, None stands for it.
    """
    if isinstance(value, Mapping):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in value)
    if not isinstance(value, Tensor):
        return value
    full = value.full_tensor() if is_sharded(value) else value  # pyright: ignore[reportAttributeAccessIssue]
    return None if keep is None else keep(full)


@torch.no_grad()
def shared_out(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full` where `like`, of the same shape, is sharded; otherwise `full`. No communication."""
    if not is_sharded(like):
        return full
    return _distributed(full, like, like.placements)  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def shared_out_beside(state: Any, parameter: Tensor) -> Any:
    """`state`, what an optimiser remembers of `parameter`, as that optimiser made it.

    A tensor in the shape of the parameter is shared out as the parameter is. Any other is kept whole on every rank.
    """
    if not is_sharded(parameter) or not isinstance(state, Tensor) or state.dim() == 0:
        return state
    if state.shape == parameter.shape:
        return shared_out(state, parameter)
    from torch.distributed.tensor import Replicate

    return _distributed(state, parameter, [Replicate()])


def _distributed(full: Tensor, like: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    part = distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)
    return part.clone()  # a part may be a view, which would keep the whole
