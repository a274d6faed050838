"""The compiled part of the layer: plain C functions, built by the package's ordinary install, called with ctypes.

It knows nothing of Python or torch, only of pointers and sizes, so that one build serves every version of both. Where
no compiler was at hand at the install, or the package runs from a bare checkout, there is no library and the
slower paths in ATen serve.
"""

import ctypes
import functools
import sysconfig
from pathlib import Path

ABI = 3
"""What `syncbn_abi` of a library built from these sources returns; raised with every change of a signature."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where there is none, or one of other sources."""
    path = Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        found = ctypes.CDLL(str(path))
        return found if found.syncbn_abi() == ABI else None
    except (OSError, AttributeError):
        return None
