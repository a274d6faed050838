"""Memory for the layer's results on a CPU, used again from one step to the next.

A training step frees each large result and asks for one of the same size soon after. glibc gives such blocks back to
the kernel at once, and page faults then cost more than the passes over memory (8x64x56x56 in float32, forward and
backward: 2.5 ms, and 9 ms with 3100 faults). The library keeps what results no longer need (`native/allocator.cpp`),
never more than they have needed at one time.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from syncbn.norm.backends.native_call import DTYPES
from syncbn.norm.native import library

SMALLEST_BYTES = 1 << 18
"""Below it glibc keeps what is freed, and PyTorch's own way is shorter."""


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape, strides and dtype of `x`, which lies in memory without gaps.

    It is an ordinary tensor, but that its storage cannot be resized. A subclass's is torch's.
    """
    if type(x) is not Tensor or x.nbytes < SMALLEST_BYTES:
        return torch.empty_like(x)
    ndim = x.dim()
    layout = struct.pack(f"{2 * ndim}q", *x.shape, *x.stride())
    result, capsule = _native()
    managed = result(ndim, layout, DTYPES[x.dtype], x.nbytes)
    return (
        torch.empty_like(x) if managed is None else from_dlpack(capsule(managed, b"dltensor", None))
    )


def release_memory() -> int:
    """Give memory that was kept for results, and is not in use, back to the system; returns how many bytes.

    Nothing needs it but a process that has trained, goes on, and is short of memory.
    """
    found = library()
    if found is None:
        return 0
    found.syncbn_release.restype = ctypes.c_int64
    return found.syncbn_release()


@functools.cache
def _native() -> tuple[Callable[..., int | None], Callable[..., Any]]:
    """The library's function that makes a result, and Python's that makes a capsule of it."""
    found = library()
    assert found is not None, "kernels that need it were picked"
    found.syncbn_result.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64]
    found.syncbn_result.restype = ctypes.c_void_p
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule.restype = ctypes.py_object
    return found.syncbn_result, capsule
