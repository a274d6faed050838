"""The layers that probes measure, counted from 1, and what goes through them.

A layer is a linear map or a convolution. In our own networks each hidden one stands beside its activation in a part of
`model.hidden`, and `model.output` is the last; in any other network layers are counted in the order it names them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from syncbn.errors import UsageError
from syncbn.probes.aside import own_statistics
from syncbn.probes.view import View


@dataclass(frozen=True)
class Layer:
    """A linear map or convolution, with the activation that follows it where that is known."""

    number: int
    affine: nn.Module
    activation: nn.Module | None = None


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of `model`; the output layer is the last."""
    blocks = hidden_blocks(model)
    if not blocks:
        affine = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [Layer(number, module) for number, module in enumerate(affine, 1)]
    hidden = [
        Layer(number, block.get_submodule("affine"), block.get_submodule("activation"))
        for number, block in enumerate(blocks, 1)
    ]
    return [*hidden, Layer(len(hidden) + 1, model.get_submodule("output"))]


def hidden_blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of `model.hidden` that have an affine map and an activation; none in networks that are not ours."""
    hidden = getattr(model, "hidden", None)
    blocks = hidden.children() if isinstance(hidden, nn.Module) else ()
    return [block for block in blocks if hasattr(block, "affine") and hasattr(block, "activation")]


def require_hidden_layers(view: View, probe: str) -> None:
    """Raise `UsageError` for a network in which `probe` cannot tell activations from layers."""
    if not hidden_blocks(view.model):
        raise UsageError(
            f"probe {probe} cannot look into model={view.cfg.model.name}: use mlp, cnn or vgg with a hidden layer"
        )


@torch.no_grad()
def run_probe_images(view: View, *hooks: "Hook") -> None:
    """One pass of the probe images with batch statistics of their own, calling `hooks` on the way."""
    with own_statistics(view.model), _hooked(hooks):
        view.model(view.probe_images())


Hook = tuple[nn.Module, Callable[[Tensor, Tensor], None]]
"""A module, and what is called with its input and output each time."""


@contextmanager
def _hooked(hooks: tuple[Hook, ...]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda _, inputs, output, tell=tell: tell(inputs[0], output))
        for module, tell in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_unit(values: Tensor) -> Tensor:
    """`values` (N, C, *) as (N * positions, C): what each unit, or each channel of a convolution, takes."""
    return values.flatten(2).transpose(1, 2).flatten(0, 1) if values.dim() > 2 else values
