"""Checks of what users hand to the layer: arguments, process groups, and the operands of a forward pass.

Every error names the argument, its value and what is allowed.
"""

import math
import operator
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from syncbn.norm.comm.exchange import Exchange
from syncbn.norm.comm.groups import GroupSpec, check_spec


def checked_num_features(value: object) -> int:
    """`num_features` as an int; raises TypeError for what is no whole number, ValueError below 1."""
    message = f"num_features={value!r} is not allowed: a whole number >= 1"
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, bool):
        raise TypeError(message)
    if number < 1:
        raise ValueError(message)
    return number


def checked_eps(value: object) -> float:
    """`eps` as a float; raises TypeError for what is no number, ValueError unless it is finite and above 0."""
    return _checked("eps", value, "a finite number > 0", lambda v: math.isfinite(v) and v > 0)


def checked_momentum(value: object) -> float | None:
    """`momentum` as a float or None; raises TypeError for what is no number, ValueError outside 0 to 1."""
    if value is None:
        return None
    return _checked("momentum", value, "None, or a number from 0 to 1", lambda v: 0 <= v <= 1)


def _checked(name: str, value: object, allowed: str, holds: Callable[[float], bool]) -> float:
    message = f"{name}={value!r} is not allowed: {allowed}"
    if not isinstance(value, Real):  # numpy's numbers are, its booleans are not
        raise TypeError(message)
    number = float(value)
    if not holds(number):
        raise ValueError(message)
    return number


def checked_group(spec: GroupSpec) -> GroupSpec:
    """`process_group`, with a size of any integer type as an int; see `check_spec` for what it raises."""
    if isinstance(spec, Integral) and not isinstance(spec, bool):
        spec = int(spec)
    check_spec(spec)
    return spec


def check_operands(
    input: Tensor,
    num_features: int | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raise for operands of a forward pass that do not fit each other.

    Args:
        input: `(N, C, *)`, floating point.
        num_features: C, where the layer knows it.
        mask: bool, expands to `(N, 1, *)`.
        residual: in the shape of `input`.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: `input` that is not floating point, `mask` that is not bool, a sparse `input` or `residual`.
    """
    if input.dim() < 2 or not input.shape[1]:
        shape = tuple(input.shape)
        raise ValueError(f"expected input (N, C, *), C >= 1, got {input.dim()}D input {shape}")
    if num_features is not None and input.shape[1] != num_features:
        raise ValueError(f"expected {num_features} channels, got {input.shape[1]}")
    if not input.is_floating_point():
        raise TypeError(f"expected floating-point input, got {input.dtype}")
    if input.layout is not torch.strided:
        raise TypeError(f"expected a dense input, got one of {input.layout}")
    if residual is not None:
        _check_device("residual", residual, input)
        if residual.shape != input.shape:
            raise ValueError(
                f"expected a residual of shape {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
        if residual.layout is not torch.strided:
            raise TypeError(f"expected a dense residual, got one of {residual.layout}")
    if mask is not None:
        _check_mask(mask, input)


def _check_mask(mask: Tensor, input: Tensor) -> None:
    _check_device("mask", mask, input)
    if mask.dtype != torch.bool:
        raise TypeError(f"expected a mask of dtype torch.bool, got {mask.dtype}")
    expected = (input.shape[0], 1, *input.shape[2:])
    fits = mask.dim() == input.dim() and all(
        have in (want, 1) for have, want in zip(mask.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"expected a mask that expands to {expected}, got {tuple(mask.shape)}")


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"expected a {name} on {input.device}, got {tensor.device}")


def fitted(mask: Tensor, input: Tensor) -> Tensor:
    """A checked `mask` as the backends read it: `(N, 1, *)` with the trailing sizes of `input`, contiguous."""
    return mask.expand(input.shape[0], 1, *input.shape[2:]).contiguous()


def tell_ranks(exchange: Exchange | None, input: Tensor, message: str) -> None:
    """Let the other ranks' exchange fail with `message`, because this rank cannot take part in it."""
    if exchange is not None and not input.is_cuda:
        exchange.fail(message)
