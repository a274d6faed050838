"""Launches of Triton kernels that cost the host little.

Triton looks at every argument of every launch to find the code compiled for the like of them, and calls hooks for
profilers even where there are none: 23 us a launch on the host of an H100, of which CUDA's part is less than half.
Here what decides is known beforehand: dtypes, and the statics of the call. What was compiled once is found by them and
handed plain addresses.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

ALIGNMENT = 16
"""Bytes that addresses are multiples of where Triton compiles for aligned ones."""

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    statics: tuple[Any, ...],
) -> None:
    """Launch on the device of the first tensor.

    Without fused multiply-adds, backward computes the very z that forward computed, whatever else its kernel does, so
    that both see the same side of a kink; these kernels wait for memory, not for arithmetic.

    Args:
        kernel: takes tensors, numbers and statics in this order.
        grid: programs, on two axes.
        tensors: the first is not None.
        numbers: sizes and floats, none of which the kernel is compiled anew for.
        statics: values of its constexpr parameters, but for `num_warps`, which comes last.
    """
    first = tensors[0]
    assert first is not None
    device = first.device.index
    if device is None or device != torch.cuda.current_device():  # None: the interpreter's
        with torch.cuda.device_of(first):
            _find_and_launch(kernel, grid, tensors, numbers, statics)
        return
    addresses, together = [], 0
    usual = True
    for tensor in tensors:
        address = 0
        if tensor is not None:
            address = tensor.data_ptr()
            together |= address
            usual = usual and tensor.get_device() == device  # else Triton has its say
        addresses.append(address)
    usual = usual and together % ALIGNMENT == 0 and max(numbers) < 2**31
    watched = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
    if not usual or watched:
        _find_and_launch(kernel, grid, tensors, numbers, statics)
        return
    key = (kernel.fn, device, statics, *[None if t is None else t.dtype for t in tensors])
    code = _compiled.get(key)
    if code is None:
        _compiled[key] = _find_and_launch(kernel, grid, tensors, numbers, statics)
        return
    stream = driver.active.get_current_stream(device)  # pyright: ignore[reportAttributeAccessIssue]
    place = (*grid, 1, stream)
    hooks = (None, None, None)
    code.run(
        *place, code.function, code.packed_metadata, *hooks, *addresses, *numbers, *statics[:-1]
    )


def _find_and_launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    statics: tuple[Any, ...],
) -> Any:
    """Have Triton find the code; what it found."""
    *constants, num_warps = statics
    arguments = (*tensors, *numbers, *constants)
    return kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False)
