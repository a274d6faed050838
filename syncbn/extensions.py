"""Importing the modules that users name in `extensions`, in every process that works on a run.

A name is found as any module is, and besides in the current folder: `mine` is `mine.py` there, or a package. Packages
that are installed may also announce modules under the entry-point group `syncbn.extensions`; those are always imported.
"""

import importlib
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from syncbn.errors import SyncbnError, UsageError

ENTRY_POINTS = "syncbn.extensions"


def load_extensions(names: Iterable[str]) -> None:
    """Import the modules of `names`, and those of installed packages; what is imported already stays.

    Raises:
        UsageError: a module that cannot be found or that raises while it is imported.
    """
    for point in entry_points(group=ENTRY_POINTS):
        _import(point.value.partition(":")[0], f"entry point {point.name}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    for name in names:
        _import(name, f"extensions=[{name}]")


def _import(name: str, what: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(
            f"{what} is not allowed: the name of a module, not a file or an expression"
        )
    try:
        importlib.import_module(name)
    except SyncbnError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{what}: there is no module {name!r}, installed or as {name}.py in {Path.cwd()}"
            ) from error
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"{what}: importing it failed at {Path(at.filename).name}:{at.lineno} "
            f"({type(error).__name__}: {error})"
        ) from error
