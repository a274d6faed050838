"""BatchNorm to SyncBatchNorm and back, for whole models, losing nothing.

A layer is converted by giving the *same object* another class. Parameters, buffers, hooks, attributes, the
training flag and sharing between modules survive because nothing is copied; the class to go back to is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from syncbn.norm.groups import GroupSpec, check_spec
from syncbn.norm.module import SyncBatchNorm

_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ORIGINAL = "_syncbn_original_class"
_ADDED = ("layer_name", "process_group")


@dataclass(frozen=True)
class Conversion:
    """What became of one norm layer: its name in the model, its class before, and why it was left alone."""

    name: str
    cls: type[nn.Module]
    left_alone: str | None = None


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: GroupSpec = None,
    *,
    strict: bool = False,
    report: Callable[[Conversion], None] | None = None,
) -> nn.Module:
    """Turn every BatchNorm1d/2d/3d and torch.nn.SyncBatchNorm inside `module` into `SyncBatchNorm`, in place.

    Idempotent: layers that are synchronised already keep their group, or get `process_group` where it is given.

    Args:
        module: a model, or one layer.
        process_group: as for `SyncBatchNorm`.
        strict: raise when there is nothing to convert.
        report: called with a `Conversion` for every norm layer, converted or left alone.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no module.
        ValueError: a lazy BatchNorm that has seen no batch; nothing converted, with `strict`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={type(module).__name__} is not allowed: a torch.nn.Module")
    check_spec(process_group)
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, _BatchNorm)]
    conversions = [_conversion(name, layer) for name, layer in layers]
    for (name, layer), conversion in zip(layers, conversions, strict=True):
        if conversion.left_alone is None:
            _convert(layer, name, process_group)
        if report is not None:
            report(conversion)
    if strict and all(c.left_alone for c in conversions):
        raise ValueError(f"strict=True, but {type(module).__name__} has no batch norm to convert")
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Give every converted layer inside `module` its original class back, in place; returns `module`.

    A layer that was made as a `SyncBatchNorm` has no class to go back to and stays as it is.
    """
    for layer in module.modules():
        original = layer.__dict__.get(_ORIGINAL)
        if original is None:
            continue
        for attribute in (_ORIGINAL, *_ADDED):
            del layer.__dict__[attribute]
        layer.__dict__.update(layer.__dict__.pop("_syncbn_replaced"))
        layer.__class__ = original
    return module


def _conversion(name: str, layer: nn.Module) -> Conversion:
    if isinstance(layer, _LazyNormBase):  # it becomes an ordinary one with its first batch
        raise ValueError(
            f"{name or type(layer).__name__} is lazy: run one batch first, then convert"
        )
    if "forward" in layer.__dict__:
        return Conversion(name, type(layer), "its forward was replaced, and would still be used")
    if type(layer) in _CONVERTED or isinstance(layer, SyncBatchNorm):
        return Conversion(name, type(layer))
    reason = (
        f"{type(layer).__name__} is a class of its own, whose behaviour a conversion could change"
    )
    return Conversion(name, type(layer), reason)


def _convert(layer: nn.Module, name: str, process_group: GroupSpec) -> None:
    if not isinstance(layer, SyncBatchNorm):
        layer.__dict__[_ORIGINAL] = type(layer)
        replaced = {key: layer.__dict__[key] for key in _ADDED if key in layer.__dict__}
        layer.__dict__["_syncbn_replaced"] = replaced
        layer.__dict__["layer_name"] = name
        layer.__dict__["process_group"] = process_group
        layer.__class__ = SyncBatchNorm
    elif process_group is not None:
        layer.__dict__["process_group"] = process_group
