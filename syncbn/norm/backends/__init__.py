"""One rank's arithmetic: three backends with one interface, and which of them serves a device."""

import functools
import os
import warnings
from contextlib import suppress

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.jit._trace import is_tracing

from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import Backend
from syncbn.norm.backends.cpu import CpuBackend
from syncbn.norm.native import library

NAMES = ("eager", "cpu", "triton")
"""What `SYNCBN_KERNELS` may be set to: ATen, native code, Triton."""
FASTER_PLANES, FASTER_HALF, FASTER = 2**17, 2**19, 2**20
"""Values from which a layer alone is faster here than in torch: float32 planes, half precision, others (1 thread)."""


@functools.cache
def selected(device: str) -> Backend:
    """The backend for tensors on `device`, a type as in `torch.device.type`, or the one that `SYNCBN_KERNELS` names.

    The variable is read once a device type, since a look at the environment costs as much as a small kernel;
    `selected.cache_clear()` makes it read again.

    Raises:
        ValueError: `SYNCBN_KERNELS` is set to something else than one of `NAMES`.
        RuntimeError: the backend that it names cannot serve the device, or is not installed.
    """
    forced = os.environ.get("SYNCBN_KERNELS", "")
    if forced not in ("", *NAMES):
        names = ", ".join(NAMES)
        raise ValueError(f"SYNCBN_KERNELS={forced!r} is not allowed: one of {names}, or unset")
    if forced:
        return _forced(forced, device)
    if device == "cpu":
        return _native_or_aten()
    return _triton_or_aten() if device == "cuda" else AtenBackend()


def faster_alone(x: Tensor) -> bool:
    """Whether a group of one does better with a backend of ours than with torch's batch norm.

    Below some size the Python code costs more than the kernels save. Where a transform or a tracer is active, torch's
    own operation is the one it knows.
    """
    if type(x) is not Tensor or x.device.type != "cpu":
        return False
    planes = x.dtype == torch.float32 and x.is_contiguous()
    halves = x.itemsize == 2
    if x.numel() < (FASTER_PLANES if planes else FASTER_HALF if halves else FASTER):
        return False
    watched = is_tracing() or peek_interpreter_stack() is not None
    return not watched and type(selected("cpu")) is not AtenBackend


def _native_or_aten() -> Backend:
    if library() is not None:
        return CpuBackend()
    warnings.warn(
        "syncbn runs without its native kernels, several times slower on a CPU: they are built where a C++ "
        "compiler is at hand when the package is installed (pip install .)",
        RuntimeWarning,
        stacklevel=2,
    )
    return AtenBackend()


def _triton_or_aten() -> Backend:
    with suppress(ImportError):
        return _triton()
    return AtenBackend()


def _triton() -> Backend:
    # imported late, because Triton takes its time
    from syncbn.norm.backends.triton.backend import TritonBackend

    return TritonBackend()


def _forced(name: str, device: str) -> Backend:
    if name == "eager":
        return AtenBackend()
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device != {"cpu": "cpu", "triton": "cuda"}[name] and not interpreted:
        raise RuntimeError(f"SYNCBN_KERNELS={name!r} cannot serve a tensor on {device!r}")
    try:
        return CpuBackend() if name == "cpu" else _triton()
    except ImportError as error:
        raise RuntimeError(
            "SYNCBN_KERNELS='triton' needs Triton, which is not installed"
        ) from error
