"""Which kernels serve which device: the fastest that is there, or what `SYNCBN_KERNELS` asks for.

The variable is read when a device is first met, since looking at the environment in every call of every layer would
cost as much as some kernels; `chosen.cache_clear()` has it read again.
"""

import functools
import os
import warnings
from typing import TYPE_CHECKING

from syncbn.norm.backends.aten import EagerKernels
from syncbn.norm.backends.cpu import CpuKernels
from syncbn.norm.native import library

if TYPE_CHECKING:
    from syncbn.norm.backends import Kernels

NAMES = ("eager", "cpu", "triton")
"""What `SYNCBN_KERNELS` may be set to: operations of ATen, native code, Triton."""


@functools.cache
def chosen(device: str) -> "Kernels":
    """The kernels for tensors on `device`, a type as in `torch.device.type`.

    Raises:
        ValueError: `SYNCBN_KERNELS` is set to something else than one of `NAMES`.
        RuntimeError: the kernels it asks for cannot serve the device, or are not installed.
    """
    forced = os.environ.get("SYNCBN_KERNELS", "")
    if forced not in ("", *NAMES):
        names = ", ".join(NAMES)
        raise ValueError(f"SYNCBN_KERNELS={forced!r} is not allowed: one of {names}, or unset")
    if forced:
        return _forced(forced, device)
    if device == "cpu":
        return _native_or_eager()
    return _triton_or_eager() if device == "cuda" else EagerKernels()


def _native_or_eager() -> "Kernels":
    if library() is not None:
        return CpuKernels()
    warnings.warn(
        "syncbn runs without its native kernels, several times slower on a CPU: they are built where a C++ "
        "compiler is at hand when the package is installed (pip install .)",
        RuntimeWarning,
        stacklevel=2,
    )
    return EagerKernels()


def _triton_or_eager() -> "Kernels":
    try:
        return _triton()
    except ImportError:
        return EagerKernels()


def _triton() -> "Kernels":
    # imported late, because Triton takes its time
    from syncbn.norm.backends.triton.kernels import TritonKernels

    return TritonKernels()


def _forced(name: str, device: str) -> "Kernels":
    if name == "eager":
        return EagerKernels()
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device != {"cpu": "cpu", "triton": "cuda"}[name] and not interpreted:
        raise RuntimeError(f"SYNCBN_KERNELS={name!r} cannot serve a tensor on {device!r}")
    try:
        return CpuKernels() if name == "cpu" else _triton()
    except ImportError as error:
        raise RuntimeError(
            "SYNCBN_KERNELS='triton' needs Triton, which is not installed"
        ) from error
