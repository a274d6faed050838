"""Launches of Triton kernels at half of Triton's cost on the host.

For each launch Triton examines every argument to find the code compiled for its kind, and prepares hooks for profilers:
23 us on the host of an H100, of which CUDA's part is less than half. A pass is two to five launches, and below a few
million values the host's time is the layer's time. Here dtypes and the call's constants alone find the code that Triton
compiled, which is run with plain addresses. Everything else is left to Triton's own launch: other versions than the
tested ones, the interpreter, profilers, unaligned or misplaced operands, numbers of more than 32 bits.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

ALIGNMENT = 16
"""Bytes that divide all addresses where Triton compiles for aligned operands."""

TESTED = (3, 6), (3, 9)
"""The first and the last version of Triton whose compiled kernels are run directly."""

_direct = TESTED[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= TESTED[1]
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    statics: tuple[Any, ...],
) -> None:
    """Launch on the device of the first tensor.

    Args:
        kernel: takes tensors, numbers and statics in this order.
        grid: programs, on two axes.
        tensors: the first is not None.
        numbers: sizes and floats, for none of which Triton compiles a variant.
        statics: values of the constexpr parameters, then `num_warps`.
    """
    first = tensors[0]
    assert first is not None
    device, addresses, key = first.device.index, None, None
    if (
        _direct
        and device is not None  # the interpreter's
        and device == torch.cuda.current_device()
        and max(numbers) < 2**31
        and not knobs.runtime.launch_enter_hook.calls
        and not knobs.runtime.launch_exit_hook.calls
    ):
        addresses = _addresses(tensors, device)
    if addresses is not None:
        key = (kernel.fn, device, statics, *[None if t is None else t.dtype for t in tensors])
        code = _compiled.get(key)
        if code is not None:
            stream = driver.active.get_current_stream(device)  # pyright: ignore[reportAttributeAccessIssue]
            where, no_hooks = (*grid, 1, stream), (None, None, None)
            function = (code.function, code.packed_metadata)
            code.run(*where, *function, *no_hooks, *addresses, *numbers, *statics[:-1])
            return
    *constants, num_warps = statics
    arguments = (*tensors, *numbers, *constants)
    # Without fused multiply-adds backward computes the z that forward computed, whatever else its kernel does, so that
    # both are on the same side of a kink; these kernels wait for memory, not for arithmetic.
    with torch.cuda.device_of(first):
        compiled = kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False)
    if key is not None:
        _compiled[key] = compiled


def _addresses(tensors: tuple[Tensor | None, ...], device: int) -> list[int] | None:
    """Addresses, 0 for None; None where not all tensors are on `device` and aligned."""
    addresses, combined = [], 0
    for tensor in tensors:
        address = 0
        if tensor is not None:
            if tensor.get_device() != device:
                return None
            address = tensor.data_ptr()
            combined |= address
        addresses.append(address)
    return addresses if combined % ALIGNMENT == 0 else None
