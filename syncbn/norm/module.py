"""`SyncBatchNorm`, the drop-in for `torch.nn.SyncBatchNorm` that runs on any device.

It derives from torch's `_BatchNorm`, not from `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on
CPU. With one rank, or none, and in eval mode, it does exactly what torch's BatchNorm does.
"""

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.norm.exchange import exchange_of
from syncbn.norm.functional import sync_batch_norm
from syncbn.norm.groups import GroupSpec, check_spec, resolve


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the mini-batches of all ranks of a group (Ioffe & Szegedy 2015).

    Trains with the mean and variance of each channel over every rank's samples: N ranks compute what one
    process computes on the concatenated batch, gradients included, provided that the losses of ranks with
    unequal batches are weighted by W * b_w / B before DistributedDataParallel averages their gradients. Ranks
    may hold different numbers of samples, or none. Evaluation communicates nothing.

    Args:
        num_features: C of an input `(N, C, *)`.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None averages over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics for evaluation.
        process_group: who is synchronised with whom: None or "world" for all ranks, "node" for those of one
            machine, k for k consecutive ranks at a time, or a ProcessGroup. Groups given by name or size
            pickle, deep-copy and survive a checkpoint.
        device: where parameters and buffers live.
        dtype: of parameters and running statistics.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    process_group: GroupSpec
    layer_name: str
    """What error messages call this layer; conversion sets it to the layer's name in the model."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: GroupSpec = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_arguments(num_features, eps, momentum)
        check_spec(process_group)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group
        self.layer_name = ""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, `(N, C, *)`; the result keeps its shape, dtype and memory format.

        Raises:
            ValueError: fewer than 2 dimensions, another number of channels, or one value per channel in total.
            TypeError: an input that is not floating point.
        """
        if not self.training:
            self._check_input(input)
            return super().forward(input)
        group = resolve(self.process_group)
        if group is None or dist.get_world_size(group) == 1:
            self._check_input(input)
            return super().forward(input)
        self._check_input(input, group)
        return sync_batch_norm(
            input,
            self.running_mean if self.track_running_stats else None,
            self.running_var if self.track_running_stats else None,
            self.weight,
            self.bias,
            momentum=self.momentum,
            eps=self.eps,
            num_batches_tracked=self.num_batches_tracked if self.track_running_stats else None,
            process_group=group,
            name=self._title,
        )

    @property
    def _title(self) -> str:
        return self.layer_name or f"SyncBatchNorm({self.num_features})"

    def _check_input(self, input: Tensor, group: ProcessGroup | None = None) -> None:
        """Raise for an unusable input, after telling the ranks that would wait for this one."""
        error = _complaint(input, self.num_features) or self._complaint_of_original(input)
        if error is None:
            return
        if group is not None and not input.is_cuda:
            exchange_of(group).fail(f"{self._title}: {error}")
        raise error

    def _complaint_of_original(self, input: Tensor) -> ValueError | None:
        """What the class that this layer was converted from says of the input's dimensions."""
        original = self.__dict__.get("_syncbn_original_class")
        try:
            if original is not None:
                original._check_input_dim(self, input)
        except ValueError as error:
            return error
        return None

    def _check_input_dim(self, input: Tensor) -> None:
        """Satisfy torch's `_BatchNorm.forward`; `_check_input` has looked already."""

    def extra_repr(self) -> str:
        """The arguments, the group among them where it is not everybody."""
        group = "" if self.process_group is None else f", process_group={self.process_group!r}"
        return super().extra_repr() + group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """A copy in the same group: groups are shared, never copied."""
        for group in (
            self.process_group,
            self.__dict__.get("_syncbn_replaced", {}).get("process_group"),
        ):
            if isinstance(group, ProcessGroup):
                memo[id(group)] = group
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__dict__, memo))
        return duplicate

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: GroupSpec = None
    ) -> nn.Module:
        """See `syncbn.convert_sync_batchnorm`."""
        from syncbn.norm.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


def _check_arguments(num_features: object, eps: object, momentum: object) -> None:
    if isinstance(num_features, bool) or not isinstance(num_features, int):
        raise TypeError(f"num_features={num_features!r} is not allowed: a whole number >= 1")
    if num_features < 1:
        raise ValueError(f"num_features={num_features!r} is not allowed: a whole number >= 1")
    if not isinstance(eps, int | float):
        raise TypeError(f"eps={eps!r} is not allowed: a finite number > 0")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps!r} is not allowed: a finite number > 0")
    if momentum is None:
        return
    if not isinstance(momentum, int | float):
        raise TypeError(f"momentum={momentum!r} is not allowed: None, or a number from 0 to 1")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum!r} is not allowed: None, or a number from 0 to 1")


def _complaint(input: Tensor, num_features: int) -> Exception | None:
    if input.dim() < 2:
        return ValueError(f"expected input (N, C, *), got {input.dim()}D input")
    if input.shape[1] != num_features:
        return ValueError(f"expected {num_features} channels, got {input.shape[1]}")
    if not input.is_floating_point():
        return TypeError(f"expected floating-point input, got {input.dtype}")
    return None
