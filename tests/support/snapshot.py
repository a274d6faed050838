"""What a module tree is made of, to the object: the strongest equality there is between before and after."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

STATE = ("_parameters", "_buffers", "_modules")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Of every module, its class and the identity of all it holds; shared modules are listed under each name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: (id(module), _class(module), _held(module)) for name, module in modules}


def _class(module: nn.Module) -> object:
    """The class; of one that torch made for parametrisations, what it is made of."""
    if not is_parametrized(module):
        return type(module)
    return type(module).__name__, type(module).__bases__, list(module.parametrizations)


def _held(module: nn.Module) -> dict[str, object]:
    held: dict[str, object] = {}
    for key, value in vars(module).items():
        held[key] = {k: id(v) for k, v in value.items()} if key in STATE else _plain(value)
    return held


def _plain(value: object) -> object:
    """Hooks, attributes and flags: containers by their contents, which a conversion could change in place."""
    return dict(value) if isinstance(value, dict) else value
