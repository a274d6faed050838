"""BatchNorm to SyncBatchNorm and back, for whole models, losing nothing.

A layer is converted by giving the *same object* another class (see `counterparts`). Parameters, buffers, hooks,
attributes, the training flag and sharing between modules survive because nothing is copied; the class to go back to
is kept. A parametrised layer has a class of its own made by torch, which is made again upon the other class.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from syncbn.norm.comm.groups import GroupSpec, check_spec
from syncbn.norm.comm.watchdog import watch
from syncbn.norm.counterparts import ATTRIBUTES, counterpart, counterpart_of_class
from syncbn.norm.module import SyncBatchNorm

_ORIGINAL = "_syncbn_original_class"
_REPLACED = "_syncbn_replaced"
"""Values that a layer had under the names of `ATTRIBUTES`; they come back with its class."""


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
    """Turn every batch norm inside `module` into `SyncBatchNorm`, in place.

    Converted are BatchNorm1d/2d/3d, torch.nn.SyncBatchNorm, subclasses of them that keep torch's forward (they stay
    instances of their class), parametrised ones, and timm's BatchNormAct2d. Others are left alone and
    reported. Idempotent: layers that are synchronised already keep their group, or get `process_group` where it is
    given.

    Args:
        module: a model, or one layer.
        process_group: as for `SyncBatchNorm`.
        strict: raise when there is nothing to convert.
        report: called with a `Conversion` for every layer with batch statistics, converted or left alone.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no module.
        ValueError: a lazy BatchNorm that has seen no batch; nothing converted, with `strict`. Nothing is changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={type(module).__name__} is not allowed: a torch.nn.Module")
    check_spec(process_group)
    watch()
    layers = dict(module.named_modules())
    conversions = [c for name, layer in layers.items() if (c := _conversion(name, layer))]
    if strict and all(c.left_alone for c in conversions):
        raise ValueError(_nothing_converted(module, conversions))
    for conversion in conversions:
        if conversion.left_alone is None:
            _convert(layers[conversion.name], conversion.name, process_group)
        if report is not None:
            report(conversion)
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Give every converted layer inside `module` its original class back, in place; returns `module`.

    A layer that was made as a `SyncBatchNorm` has no class to go back to and stays as it is.

    Raises:
        ValueError: a layer was given yet another class after its conversion; layers before it are reverted.
    """
    for name, layer in module.named_modules():
        if _ORIGINAL in layer.__dict__:
            _revert(layer, name)
    return module


def _conversion(name: str, layer: nn.Module) -> Conversion | None:
    """What is to become of `layer`; None where it is no batch norm."""
    if isinstance(layer, _LazyNormBase) and isinstance(layer, _BatchNorm):
        raise ValueError(
            f"{name or type(layer).__name__} is lazy: run one batch first, then convert"
        )
    found = counterpart(layer)
    if found is None:
        return None
    return Conversion(name, type(layer), found if isinstance(found, str) else None)


def _nothing_converted(module: nn.Module, conversions: list[Conversion]) -> str:
    left = "".join(f"; {c.name or 'the module'}: {c.left_alone}" for c in conversions)
    return f"strict=True, but {type(module).__name__} has no batch norm to convert{left}"


def _convert(layer: nn.Module, name: str, process_group: GroupSpec) -> None:
    state = layer.__dict__
    if not isinstance(layer, SyncBatchNorm):
        cls = counterpart(layer)
        assert isinstance(cls, type)
        state[_REPLACED] = {key: state.pop(key) for key in ATTRIBUTES if key in state}
        state[_ORIGINAL] = parametrize.type_before_parametrizations(layer)
        state.update(layer_name=name, process_group=process_group)
        _give_class(layer, cls)
    elif process_group is not None:
        state["process_group"] = process_group


def _revert(layer: nn.Module, name: str) -> None:
    state = layer.__dict__
    original = state[_ORIGINAL]
    if parametrize.type_before_parametrizations(layer) is not counterpart_of_class(original):
        raise ValueError(
            f"{name or 'the module'} became a {type(layer).__name__} after it was converted: revert before that"
        )
    _give_class(layer, original)
    for key in (_ORIGINAL, *ATTRIBUTES):
        state.pop(key, None)
    state.update(state.pop(_REPLACED))


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
