# pyright: reportArgumentType=false, reportAssignmentType=false
"""Activations and their derivatives in Triton, by the codes of `syncbn.norm.backends.activations.ACTIVATIONS`.

Comparisons are written so that NaN passes through functions, and derivatives agree with the table at its kinks.
"""

import triton
import triton.language as tl

from syncbn.norm.backends.activations import ACTIVATIONS, LEAK

_LEAK = tl.constexpr(LEAK)
_RELU = tl.constexpr(ACTIVATIONS["relu"].code)
_RELU6 = tl.constexpr(ACTIVATIONS["relu6"].code)
_LEAKY_RELU = tl.constexpr(ACTIVATIONS["leaky_relu"].code)
_SILU = tl.constexpr(ACTIVATIONS["silu"].code)
_HARDSWISH = tl.constexpr(ACTIVATIONS["hardswish"].code)


@triton.jit
def activate(z: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """f(z); z itself for the code 0."""
    y = z
    if ACT == _RELU:
        y = tl.where(z < 0, 0.0, z)
    elif ACT == _RELU6:
        y = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == _LEAKY_RELU:
        y = tl.where(z < 0, z * _LEAK, z)
    elif ACT == _SILU:
        y = z / (1 + tl.exp(-z))
    elif ACT == _HARDSWISH:
        y = tl.where(z < -3, 0.0, tl.where(z > 3, z, z * (z + 3) / 6))
    return y


@triton.jit
def slope(z: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """f'(z), for any code but 0; y may stand for z where the table's `from_output` is true."""
    if ACT == _SILU:
        gate = 1 / (1 + tl.exp(-z))
        derivative = gate * (1 + z * (1 - gate))
    elif ACT == _HARDSWISH:
        derivative = tl.where(z < -3, 0.0, tl.where(z <= 3, z / 3 + 0.5, 1.0))
    else:
        derivative = slope_from_bits(has_unit_slope(z, ACT), z.dtype, ACT)
    return derivative


@triton.jit
def has_unit_slope(z: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """Where f'(z) is 1, for an activation whose derivative takes two values."""
    unit_slope = z > 0
    if ACT == _RELU6:
        unit_slope = unit_slope & (z < 6)
    return unit_slope


@triton.jit
def slope_from_bits(unit_slope: tl.tensor, dtype: tl.constexpr, ACT: tl.constexpr) -> tl.tensor:
    """f'(z) from `has_unit_slope(z)`."""
    below: tl.constexpr = _LEAK if ACT == _LEAKY_RELU else 0.0
    return tl.where(unit_slope, tl.full(unit_slope.shape, 1.0, dtype), below)
