"""Conversion of whole models from BatchNorm to SyncBatchNorm and back.

A layer is converted by giving the *same object* another class. Parameters, buffers, hooks, attributes, the training
flag and sharing between modules survive because nothing is copied; the former class is kept, to revert to.

A layer is converted only where its training forward is known to be torch's: torch's own classes, subclasses that keep
`forward`, and timm's norm with an activation. A conversion so never changes what a layer computes on one rank. Other
layers are left alone, and those of them that normalise with the batch are named in a warning.
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from syncbn.norm.comm.groups import GroupSpec
from syncbn.norm.comm.watchdog import watch
from syncbn.norm.module import ORIGINAL_CLASS, REPLACED, SyncBatchNorm
from syncbn.norm.validation import checked_group

_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TIMMS = ("BatchNormAct2d", "SyncBatchNormAct")
_ATTRIBUTES = ("layer_name", "process_group", "act")
"""What a SyncBatchNorm has beside the attributes of torch's batch norms."""
_FIXED = "has fixed statistics: nothing to synchronise"


@dataclass(frozen=True)
class Conversion:
    """What a conversion does to one norm layer.

    Attributes:
        name: of the layer in the model; "" for the model itself.
        cls: its class before.
        left_alone: why it is not converted; None where it is.
        local: whether it is left alone though it normalises with the batch, which then is that of its rank alone.
    """

    name: str
    cls: type[nn.Module]
    left_alone: str | None = None
    local: bool = False


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: GroupSpec = None,
    *,
    strict: bool = False,
    report: Callable[[Conversion], None] | None = None,
) -> nn.Module:
    """Turn every batch norm inside `module` into `SyncBatchNorm`, in place.

    Converted are BatchNorm1d/2d/3d and their subclasses that keep torch's forward (they stay instances of their
    class), torch.nn.SyncBatchNorm, parametrised ones, and timm's BatchNormAct2d. Other norms that keep running
    statistics are left alone. Those that normalise with the batch, by a forward of their own, a replaced forward or
    compiled by torch.jit, are named in one UserWarning; frozen norms and instance norms are not. Calls of
    `torch.nn.functional.batch_norm`, and classes that keep no running statistics, cannot be seen.

    Idempotent: layers that are synchronised already keep their group, or get `process_group` where it is given.
    torch.nn.SyncBatchNorm keeps its group likewise.

    Args:
        module: a model, or one layer.
        process_group: as for `SyncBatchNorm`.
        strict: raise when there is nothing to convert, or a norm that normalises with the batch is left alone.
        report: called with a `Conversion` for every norm that keeps running statistics, converted or left alone.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no module.
        ValueError: a lazy BatchNorm that has seen no batch; see `strict`. Nothing is changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={type(module).__name__} is not allowed: a torch.nn.Module")
    process_group = checked_group(process_group)
    watch(runs=False)
    layers = {name: m for name, m in module.named_modules() if _keeps_statistics(m)}
    conversions = [_conversion(name, layer) for name, layer in layers.items()]
    local = [c for c in conversions if c.local]
    if strict and (local or all(c.left_alone for c in conversions)):
        raise ValueError(_strict_message(module, local, conversions))
    for conversion in conversions:
        if conversion.left_alone is None:
            _convert(layers[conversion.name], conversion.name, process_group)
        if report is not None:
            report(conversion)
    if local:
        warnings.warn(
            f"norm layers left alone, which normalise with the batch of one rank: {_listed(local)}",
            stacklevel=2,
        )
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Give every converted layer inside `module` its original class back, in place; returns `module`.

    A layer that was made as a `SyncBatchNorm` has no other class and stays as it is.

    Raises:
        ValueError: a layer was given yet another class after its conversion; layers before it are reverted.
    """
    for name, layer in module.named_modules():
        if ORIGINAL_CLASS in layer.__dict__:
            _revert(layer, name)
    return module


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


class _LeftAlone(Exception):
    """Why a norm layer has no synchronised class, for the user."""


def _keeps_statistics(layer: nn.Module) -> bool:
    """Whether `layer` is a batch norm, or keeps running statistics as one does."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "BatchNorm" in _class_name(layer)
    kept = {"running_mean", "running_var"} <= layer._buffers.keys()
    return isinstance(layer, _BatchNorm) or (kept and not isinstance(layer, _InstanceNorm))


def _conversion(name: str, layer: nn.Module) -> Conversion:
    """What is to become of `layer`, which is not changed yet."""
    if isinstance(layer, _LazyNormBase):
        raise ValueError(
            f"{name or type(layer).__name__} is lazy: run one batch first, then convert"
        )
    try:
        _synchronised_class(layer)
    except _LeftAlone as reason:
        return Conversion(name, type(layer), str(reason), local=str(reason) != _FIXED)
    return Conversion(name, type(layer))


def _class_name(layer: nn.Module) -> str:
    return (
        layer.original_name if isinstance(layer, torch.jit.ScriptModule) else type(layer).__name__
    )


def _synchronised_class(layer: nn.Module) -> type[SyncBatchNorm]:
    """The class that `layer` gets; raises `_LeftAlone` where it gets none."""
    name = _class_name(layer)
    if isinstance(layer, torch.jit.ScriptModule):
        raise _left_alone(name, "is compiled by torch.jit: convert the model before it is")
    if not isinstance(layer, _BatchNorm):
        raise _left_alone(name, "keeps running statistics in a class of its own")
    cls = parametrize.type_before_parametrizations(layer)
    if issubclass(cls, SyncBatchNorm):
        return cls
    if "forward" in layer.__dict__:
        raise _LeftAlone("its forward was replaced, and would still be used")
    found = _counterpart(cls)
    if found is SyncBatchNormAct:
        if {"drop", "act"} <= layer._modules.keys():
            return found
        raise _LeftAlone(f"{name} without its submodules drop and act")
    for key in _ATTRIBUTES:
        if key in layer._modules or hasattr(cls, key):
            raise _LeftAlone(f"its {key!r} would be hidden by SyncBatchNorm's own")
    return found


def _left_alone(name: str, reason: str) -> _LeftAlone:
    """For a class that torch does not know; those with fixed statistics are called Frozen..."""
    return _LeftAlone(_FIXED if name.startswith("Frozen") else f"{name} {reason}")


@functools.cache
def _counterpart(cls: type[nn.Module]) -> type[SyncBatchNorm]:
    """The synchronised class for layers of class `cls`; raises `_LeftAlone` where their forward is not torch's."""
    if cls in _TORCHS:
        return SyncBatchNorm
    if cls.__name__ in _TIMMS and cls.__module__.split(".")[0] == "timm":
        return SyncBatchNormAct
    if cls.forward is not _BatchNorm.forward:
        own = "has a forward of its own, whose behaviour a conversion could change"
        raise _left_alone(cls.__name__, own)
    return _with_methods_of(cls)


def _with_methods_of(cls: type[nn.Module]) -> type[SyncBatchNorm]:
    """`SyncBatchNorm` that still is a `cls`, with its methods."""

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        del protocol
        return _blank, (cls,), self.__getstate__()

    body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": reduce}
    bases = (SyncBatchNorm, cls)
    return types.new_class(f"Sync{cls.__name__}", bases, exec_body=lambda names: names.update(body))


def _blank(cls: type[nn.Module]) -> nn.Module:
    """A converted `cls` without state, for unpickling: its class has no name under which it could be imported."""
    synchronised = _counterpart(cls)
    return synchronised.__new__(synchronised)


def _convert(layer: nn.Module, name: str, process_group: GroupSpec) -> None:
    state, cls = layer.__dict__, _synchronised_class(layer)
    if not isinstance(layer, SyncBatchNorm):
        if process_group is None and isinstance(layer, nn.SyncBatchNorm):
            process_group = layer.process_group
        state[REPLACED] = {key: state.pop(key) for key in _ATTRIBUTES if key in state}
        state[ORIGINAL_CLASS] = parametrize.type_before_parametrizations(layer)
        state.update(layer_name=name, process_group=process_group)
        _give_class(layer, cls)
    elif process_group is not None:
        state["process_group"] = process_group


def _revert(layer: nn.Module, name: str) -> None:
    state = layer.__dict__
    original = state[ORIGINAL_CLASS]
    if parametrize.type_before_parametrizations(layer) is not _counterpart(original):
        raise ValueError(
            f"{name or 'the module'} became a {type(layer).__name__} after it was converted: revert before that"
        )
    _give_class(layer, original)
    for key in (ORIGINAL_CLASS, *_ATTRIBUTES):
        state.pop(key, None)
    state.update(state.pop(REPLACED))


def _give_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Make `layer` a `cls`, with the parametrisations it has: torch keeps them as properties of a class of its own."""
    if not parametrize.is_parametrized(layer):
        layer.__class__ = cls
        return
    names, former = list(layer.parametrizations), vars(type(layer))  # pyright: ignore[reportArgumentType]
    properties = {name: former[name] for name in names}
    layer.__class__ = cls
    parametrize._inject_new_class(layer)
    for name, value in properties.items():
        setattr(type(layer), name, value)


def _strict_message(
    module: nn.Module, local: list[Conversion], conversions: list[Conversion]
) -> str:
    if local:
        return f"strict=True, but norm layers that normalise with the batch would be left alone: {_listed(local)}"
    left = f"; left alone: {_listed(conversions)}" if conversions else ""
    return f"strict=True, but {type(module).__name__} has no batch norm to convert{left}"


def _listed(conversions: Iterable[Conversion]) -> str:
    """`'1', '4.bn' (Class): reason; ...`, each class and reason once."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for c in conversions:
        names.setdefault((c.cls.__name__, c.left_alone), []).append(
            repr(c.name) if c.name else "the module"
        )
    return "; ".join(f"{', '.join(at)} ({cls}): {why}" for (cls, why), at in names.items())
