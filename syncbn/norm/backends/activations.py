"""The activations that a norm layer can take in, with their derivatives: the one table all kernels agree with.

Kinks follow torch: the derivative of relu at 0 is 0. Where the derivative can be told from the output, the output
is what backward keeps (the next layer keeps it anyway); else the pre-activation z is computed again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardswish, leaky_relu, relu, relu6, silu

LEAK = 0.01
"""The slope of leaky_relu below zero, torch's default."""


class Activation(NamedTuple):
    """An activation y = f(z).

    Attributes:
        code: its number in native kernels; 0 is the identity.
        derivative: f'(z), of a tensor of z; differentiable too.
        from_output: whether `derivative` gives the same when it is handed y in the place of z.
    """

    code: int
    derivative: Callable[[Tensor], Tensor]
    from_output: bool


def _silu_derivative(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _hardswish_derivative(z: Tensor) -> Tensor:
    slope = torch.where(z <= 3, z / 3 + 0.5, torch.ones_like(z))
    return torch.where(z < -3, torch.zeros_like(z), slope)


def _step(z: Tensor, below: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, below))


ACTIVATIONS = {
    "relu": Activation(1, lambda z: _step(z, 0.0), from_output=True),
    "relu6": Activation(2, lambda z: ((z > 0) & (z < 6)).to(z.dtype), from_output=True),
    "leaky_relu": Activation(3, lambda z: _step(z, LEAK), from_output=True),
    "silu": Activation(4, _silu_derivative, from_output=False),
    "hardswish": Activation(5, _hardswish_derivative, from_output=False),
}
"""By the name that `act=` takes."""


def check_act(act: object) -> None:
    """Raise ValueError for anything but None and the names in `ACTIVATIONS`."""
    if act is not None and act not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"act={act!r} is not allowed: None or one of {names}")


def apply_act(act: str | None, z: Tensor) -> Tensor:
    """The activation called `act` of `z`; spelt out, so that TorchScript takes it too."""
    if act is None:
        return z
    if act == "relu":
        return relu(z)
    if act == "relu6":
        return relu6(z)
    if act == "leaky_relu":
        return leaky_relu(z)
    if act == "silu":
        return silu(z)
    if (
        z.dtype == torch.float64
    ):  # ATen's CUDA kernel multiplies by a sixth that is rounded to float32
        return z * relu6(z + 3) / 6
    return hardswish(z)
