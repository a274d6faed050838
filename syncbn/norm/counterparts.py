"""Which synchronised class stands for a norm layer's own, and why some layers have none.

Decision: a layer is converted only where its training forward is known to be torch's. That is so for torch's own
classes, for subclasses that leave `forward` alone, and for timm's norm with an activation. What remains is named
with a reason, so that a conversion never changes what a layer computes, and never leaves one out silently.
"""

import functools
import types
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from syncbn.norm.module import SyncBatchNorm

_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TIMMS = ("BatchNormAct2d", "SyncBatchNormAct")

ATTRIBUTES = ("layer_name", "process_group", "act")
"""What a SyncBatchNorm has beside the attributes of torch's batch norms."""


class SyncBatchNormAct(SyncBatchNorm):
    """What timm's BatchNormAct2d becomes: the norm, then the layer's own submodules `drop` and `act`."""

    @property
    def act(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The submodule, which SyncBatchNorm's attribute of this name would hide."""
        return cast(nn.Module, self._modules["act"])

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """act(drop(batch_norm(input))), `(N, C, H, W)` as `input`; raises what `SyncBatchNorm` does."""
        return self.act(self.drop(super().forward(input)))  # pyright: ignore[reportCallIssue]

    def _activation(self) -> None:
        """Nothing is fused: the submodule may have hooks and parameters of its own."""


def counterpart(layer: nn.Module) -> type[SyncBatchNorm] | str | None:
    """The class that synchronises `layer`, else the reason why there is none; None where it is no batch norm."""
    if isinstance(layer, torch.jit.ScriptModule):
        return _reason_of_scripted(layer)
    if not isinstance(layer, _BatchNorm):
        return _reason_of_foreign(layer)
    if "forward" in layer.__dict__:
        return "its forward was replaced, and would still be used"
    cls = type_before_parametrizations(layer)
    return cls if issubclass(cls, SyncBatchNorm) else _counterpart_or_reason(layer, cls)


def _counterpart_or_reason(layer: _BatchNorm, cls: type[nn.Module]) -> type[SyncBatchNorm] | str:
    found, name = counterpart_of_class(cls), cls.__name__
    if found is None:
        return f"{name} has a forward of its own, whose behaviour a conversion could change"
    if found is SyncBatchNormAct:
        complete = {"drop", "act"} <= layer._modules.keys()
        return found if complete else f"{name} without its submodules drop and act"
    hidden = [key for key in ATTRIBUTES if key in layer._modules or hasattr(cls, key)]
    return f"its {hidden[0]!r} would be hidden by SyncBatchNorm's own" if hidden else found


@functools.cache
def counterpart_of_class(cls: type[nn.Module]) -> type[SyncBatchNorm] | None:
    """The class that layers of class `cls` get; None where what they compute is not known to be torch's."""
    if cls in _TORCHS:
        return SyncBatchNorm
    if cls.__name__ in _TIMMS and cls.__module__.split(".")[0] == "timm":
        return SyncBatchNormAct
    return _with_methods_of(cls) if cls.forward is _BatchNorm.forward else None


def _with_methods_of(cls: type[nn.Module]) -> type[SyncBatchNorm]:
    """`SyncBatchNorm` that still is a `cls`, with its methods."""

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        del protocol
        return _blank, (cls,), self.__getstate__()

    body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": reduce}
    bases = (SyncBatchNorm, cls)
    return types.new_class(f"Sync{cls.__name__}", bases, exec_body=lambda names: names.update(body))


def _blank(cls: type[nn.Module]) -> nn.Module:
    """An instance of the counterpart of `cls` without state, for unpickling: the class itself has no name to import."""
    synchronised = counterpart_of_class(cls)
    assert synchronised is not None
    return synchronised.__new__(synchronised)


def _reason_of_scripted(layer: torch.jit.ScriptModule) -> str | None:
    if "BatchNorm" in layer.original_name:
        return "it is compiled by torch.jit: convert the model before it is"
    return None


def _reason_of_foreign(layer: nn.Module) -> str | None:
    """Why a module that keeps running statistics, but is none of torch's batch norms, stays as it is."""
    kept = {"running_mean", "running_var"} <= layer._buffers.keys()
    if not kept or isinstance(layer, _InstanceNorm):
        return None
    if type(layer).__name__.startswith("Frozen"):
        return "has fixed statistics: nothing to synchronise"
    return f"{type(layer).__name__} keeps running statistics in a class of its own"
