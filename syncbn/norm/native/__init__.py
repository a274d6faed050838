"""Loads the native library: plain C functions, built by the package's ordinary install, called with ctypes.

They take pointers and sizes alone, so that one build serves every version of Python and torch. Without a compiler at
the install, and in a bare checkout, there is no library, and ATen does the arithmetic.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import json
import sysconfig
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

ABI = 10
"""What `syncbn_abi` of a library built from these sources returns; raised with every change of a signature."""

_INT, _POINTER, _BYTES = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
_ARGUMENTS = {
    "pass": (_BYTES,),
    "fused_pass": (_BYTES, _BYTES),
    "finish_pass": (_BYTES, _POINTER, _INT, _INT),
    "allocate": (_INT, _BYTES, ctypes.c_int, _INT),
    "exchange_publish": (_POINTER, _INT, _BYTES, _POINTER, _INT),
    "exchange_wait": (_POINTER, _INT, _POINTER, _INT, _INT, _INT),
    "exchange_fail": (_POINTER, _INT, _BYTES, _INT),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where there is none, or one of other sources."""
    name = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    for folder in (Path(__file__).parent, _installed_folder()):
        with contextlib.suppress(OSError, AttributeError):
            found = ctypes.CDLL(str(folder / name))
            if found.syncbn_abi() == ABI:
                return _declared(found)
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """`found` with the types of its functions; the others take nothing and return an int."""
    for name, types in _ARGUMENTS.items():
        getattr(found, f"syncbn_{name}").argtypes = types
    found.syncbn_allocate.restype, found.syncbn_release_memory.restype = _POINTER, _INT
    found.syncbn_pass.restype = found.syncbn_exchange_fail.restype = None
    return found


def _installed_folder() -> Path:
    """This package as it was installed: its sources may stand before it on the path, as they do in a Ray job."""
    try:
        installed = importlib.metadata.distribution("syncbn")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, OSError):  # the latter without descriptors
        return Path()
    root = Path(str(installed.locate_file("")))
    if origin.get("dir_info", {}).get("editable"):
        root = Path(url2pathname(urlparse(origin["url"]).path))
    return root / "syncbn/norm/native"
