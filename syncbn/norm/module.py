"""`SyncBatchNorm`, the drop-in for `torch.nn.SyncBatchNorm` that runs on any device.

It derives from torch's `_BatchNorm`, not from `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on
CPU. With one rank, or none, and in eval mode, it does exactly what torch's BatchNorm does.
"""

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.distributed import GroupMember, ProcessGroup
from torch.fx import Proxy, Tracer
from torch.jit import is_scripting  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.norm import backends
from syncbn.norm.backends.activations import apply_act, check_act
from syncbn.norm.backends.base import NormArgs, Running
from syncbn.norm.comm.exchange import Exchange, exchange_for
from syncbn.norm.comm.fingerprint import NAMED
from syncbn.norm.comm.groups import GroupSpec
from syncbn.norm.comm.watchdog import watch
from syncbn.norm.ops.autograd import Call, SyncBatchNormFunction
from syncbn.norm.ops.custom_op import compiled_batch_norm, group_text
from syncbn.norm.ops.recompute import current, unchanged
from syncbn.norm.validation import (
    check_operands,
    checked_eps,
    checked_group,
    checked_momentum,
    checked_num_features,
    fitted,
    tell_ranks,
)

ORIGINAL_CLASS = "_syncbn_original_class"
REPLACED = "_syncbn_replaced"
"""Attributes of a converted layer: its former class, and the values of attributes that the conversion hid."""

_PROXY = _TorchDispatchModeKey.PROXY
"""The mode of a tracer such as make_fx, which sees the registered operators, and no call of a kernel."""
_serials = itertools.count()
"""When each layer was built: tells layers without names apart."""


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
        affine: learn a weight and, with `bias`, a bias per channel.
        track_running_stats: keep running statistics for evaluation.
        process_group: the ranks that share statistics: None or "world" for all ranks, "node" for those of one
            machine, k for k consecutive ranks at a time, or a ProcessGroup. Groups given by name or size
            pickle, deep-copy and survive a checkpoint. What `torch.distributed.new_group` gives to a rank outside
            the group is accepted; that rank may evaluate and may not train.
        act: None, or an activation to apply in the same pass: "relu", "relu6", "leaky_relu", "silu" or "hardswish".
        bias: see `affine`.
        device: where parameters and buffers live.
        dtype: of parameters and running statistics.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    __constants__ = [*_BatchNorm.__constants__, "act"]  # noqa: RUF012 - torch's own spelling
    act: str | None = None
    """A class attribute, so that a layer converted from torch's has it too."""
    _serial = NAMED

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: GroupSpec = None,
        *,
        act: str | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_act(act)
        super().__init__(
            checked_num_features(num_features),
            checked_eps(eps),
            checked_momentum(momentum),
            affine,
            track_running_stats,
            device,
            dtype,
        )
        if not bias:
            self.register_parameter("bias", None)
        self.process_group: GroupSpec = checked_group(process_group)
        self._serial = next(_serials)
        self.layer_name = ""  # what error messages call it; conversion sets its name in the model
        if act is not None:
            self.act = act
        watch(runs=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state of a pickled or copied layer, which is built here and now."""
        super().__setstate__(state)
        if "_serial" in state:
            self._serial = next(_serials)
        watch(runs=False)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Appear to `torch.fx` as one `call_module` node, as torch.nn.SyncBatchNorm does.

        A tracer looks into modules whose class is not torch's own. This is called within `Tracer.call_module`, whose
        bookkeeping therefore stands, and before hooks, which belong to the calls of the traced model.
        """
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Proxy) and isinstance(tracer := value.tracer, Tracer):
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, args, kwargs)
        return super()._call_impl(*args, **kwargs)

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """act(batch_norm(input) + residual); the result keeps the shape, dtype and memory format of `input`.

        Args:
            input: `(N, C, *)`, floating point.
            mask: bool, `(N, 1, *)`; positions where it is false are left out of the statistics, come out as 0 and
                get no gradient.
            residual: in the shape of `input`, added before the activation.

        Raises:
            ValueError: fewer than 2 dimensions, another number of channels, a mask or residual that does not fit, or
                one value per channel in total.
            TypeError: an input that is not floating point, or a mask that is not bool.
        """
        if self.training:
            return self._train(input, mask, residual)
        return self._evaluate(input, mask, residual)

    def _evaluate(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        if not is_scripting():
            self._check_input(input, mask, residual)
        # outside a mask may be NaN: its gradient is 0, and 0 times NaN would reach the parameters
        if mask is not None:
            residual = None if residual is None else residual.masked_fill(~mask, 0.0)
            if self.running_mean is None:
                y = _batch_norm_of_kept(input, mask, self.weight, self.bias, self.eps)
                return self._fused(y, mask, residual)
            input = input.masked_fill(~mask, 0.0)
        y = batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.running_mean is None and self.running_var is None,
            momentum=0.0,
            eps=self.eps,
        )
        return self._fused(y, mask, residual)

    def _fused(self, y: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        """What follows the normalisation, one operation after another."""
        if residual is not None:
            y = y + residual
        y = apply_act(self._activation(), y)
        return y if mask is None else y.masked_fill(~mask, 0.0)

    @torch.jit.unused
    def _train(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or _get_dispatch_mode(_PROXY) is not None:
            return self._train_compiled(input, mask, residual)
        exchange = exchange_for(self.process_group, input)
        self._check_input(input, mask, residual, exchange)
        if exchange is None and self._torch_serves(input, mask, residual):
            return self._train_unfused(input, residual)
        if peek_interpreter_stack() is not None:
            message = (
                f"{self._title()}: torch.func transforms (vmap, grad, jvp, ...) do not pass through a training layer "
                "that exchanges statistics or takes a mask; torch.autograd and eval mode do"
            )
            tell_ranks(exchange, input, message)
            raise RuntimeError(message)
        call = Call(
            exchange,
            None if mask is None else fitted(mask, input),
            self._activation(),
            self.eps,
            self._running(),
            self._title(),
            NAMED if self.layer_name else self._serial,
            current(),
            torch.is_grad_enabled(),
        )
        weight, bias = self._held(self._parameters, "weight", "bias")
        return SyncBatchNormFunction.apply(input, weight, bias, residual, call)

    def _torch_serves(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> bool:
        """Whether torch's own operations serve a group of one: no kernel of ours is faster, or a transform runs."""
        if mask is None and (
            peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        ):
            return True
        if input.numel() == 0:  # torch counts a batch without samples
            return False
        plain = mask is None and residual is None and self._activation() is None
        one_value = input.numel() == input.shape[1]  # torch's own error
        return plain and (one_value or not backends.faster_alone(input))

    def _train_unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """Torch's batch norm, then what is fused; a replay runs the same operations, and what it counts is undone."""
        checkpointed, kept = current(), ()
        if checkpointed is not None and checkpointed.replaying:
            kept = self.running_mean, self.running_var, self.num_batches_tracked
        elif checkpointed is not None:
            checkpointed.record(None)
        with unchanged(*kept) if kept else nullcontext():
            y = super().forward(input)
        return self._fused(y, None, residual)

    def _train_compiled(
        self, input: Tensor, mask: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        self._check_input(input, mask, residual)
        if _is_alone() and mask is None:
            return self._fused(super().forward(input), None, residual)
        fused = (None if mask is None else fitted(mask, input), self._activation(), self.eps)
        args = NormArgs(input, self.weight, self.bias, residual, *fused, layer=self._title())
        return compiled_batch_norm(args, group_text(self.process_group), self._running())

    def _activation(self) -> str | None:
        """What is applied in the same pass; a subclass with a submodule `act` applies that itself, and nothing here."""
        return self.act

    def _running(self) -> Running | None:
        if not self.track_running_stats:
            return None
        names = ("running_mean", "running_var", "num_batches_tracked")
        mean, var, num_batches_tracked = self._held(self._buffers, *names)
        if mean is None or var is None:
            return None
        if num_batches_tracked is None and self.momentum is None:
            return None  # torch moves nothing then
        return Running(mean, var, num_batches_tracked, self.momentum)

    def _held(self, held: dict[str, Any], *names: str) -> list[Any]:
        """Parameters or buffers by name: a look-up in `Module.__getattr__` takes 5 times as long as in `held`."""
        return [held[name] if name in held else getattr(self, name) for name in names]

    def _title(self) -> str:
        return self.layer_name or f"SyncBatchNorm({self.num_features})"

    def _check_input(
        self,
        input: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        exchange: Exchange | None = None,
    ) -> None:
        """Raise for operands that do not fit, in a training pass after telling the other ranks of `exchange`."""
        original = self.__dict__.get(ORIGINAL_CLASS)
        try:
            check_operands(input, self.num_features, mask, residual)
            if original is not None:
                original._check_input_dim(self, input)
        except (TypeError, ValueError) as error:
            tell_ranks(exchange, input, f"{self._title()}: {error}")
            raise

    def _check_input_dim(self, input: Tensor) -> None:
        """Satisfy torch's `_BatchNorm.forward`; `_check_input` has looked already."""

    def extra_repr(self) -> str:
        """The arguments, with the group where it is not all ranks."""
        group = "" if self.process_group is None else f", process_group={self.process_group!r}"
        if self.process_group == GroupMember.NON_GROUP_MEMBER:
            group = ", process_group=<without this rank>"
        act = "" if self._activation() is None else f", act={self.act!r}"
        return super().extra_repr() + group + act

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """A copy in the same group: groups are shared, never copied."""
        for group in (self.process_group, self.__dict__.get(REPLACED, {}).get("process_group")):
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


def _is_alone() -> bool:
    """Whether there is no other rank, in a form whose change a compiler notices."""
    alone = not dist.is_available() or dist.distributed_c10d._world.default_pg is None
    return alone or dist.get_world_size() == 1


def _batch_norm_of_kept(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm of what lies inside `mask`, with its own moments; 0 outside."""
    kept = mask.expand_as(x[:, :1]).squeeze(1)
    y = batch_norm(x.movedim(1, -1)[kept], None, None, weight, bias, training=True, eps=eps)
    return torch.zeros_like(x).movedim(1, -1).index_put((kept,), y).movedim(-1, 1)
