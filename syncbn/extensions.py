"""The modules that users name in `extensions`: imported in every process that works on a run, and named when they fail.

A name is found as any module is, and besides in the current folder: `mine` is `mine.py` there, or a package. Packages
that are installed may also announce modules under the entry-point group `syncbn.extensions`; those are always imported.
"""

import dis
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from syncbn.errors import SyncbnError, UsageError

ENTRY_POINTS = "syncbn.extensions"

_packages: set[str] = set()
"""The first parts of the names of all modules that were imported here."""


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
    _packages.add(name.partition(".")[0])
    try:
        with _no_quiet_end():
            importlib.import_module(name)
    except SyncbnError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _is_raised(error):
            raise
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{what}: there is no module {name!r}, installed or as {name}.py in {Path.cwd()}"
            ) from error
        raise UsageError(
            f"{what}: importing it failed at {_line(error)} ({_reason(error)})"
        ) from error


@contextmanager
def failures_named() -> Iterator[None]:
    """Tell what the code of an extension does wrong from a bug of ours, wherever a run calls it.

    Raises:
        UsageError: in place of an error without an exit code from a line of an extension, or of its attempt to end the
            process; names the line.
    """
    try:
        with _no_quiet_end():
            yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _is_raised(error):
            raise
        if hasattr(error, "exit_code") or _is_no_memory(error) or not _is_theirs(error):
            raise
        raise UsageError(f"an extension failed at {_line(error)} ({_reason(error)})") from error


@contextmanager
def _no_quiet_end() -> Iterator[None]:
    """Within, `os._exit` of this thread raises as `sys.exit` does: else the process ends without a word, as if done.

    The function is replaced because nothing else would notice. Who started the process could ask it for a report beside
    its status, but of a run on one rank that is the user's shell, and under torchrun torch's agent, and both believe 0.
    Neither handlers of `atexit` nor audit hooks are called.
    """
    caller, end = (os.getpid(), threading.get_ident()), os._exit

    def refuse(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) != caller:
            end(status)
        raise SystemExit(status)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = end


def _is_raised(error: BaseException) -> bool:
    """Whether a line of code raised `error`; what a signal raises comes between two instructions."""
    *_, last = _links(error)
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _links(error: BaseException) -> Iterator[TracebackType]:
    link = error.__traceback__
    while link is not None:
        yield link
        link = link.tb_next


def _is_no_memory(error: BaseException) -> bool:
    """Whether `error` is Python's or torch's, which is not imported here, of a request for memory that failed."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _is_theirs(error: BaseException) -> bool:
    """Whether a line of an extension raised `error`, or called what did, with no line of ours in between."""
    for package in reversed(_packages_of(error)):
        if package in _packages:
            return True
        if package == "syncbn" and not isinstance(error, SystemExit):
            return False
    return False


def _line(error: BaseException) -> str:
    """The last line of an extension that `error` came through, as `file:line`; else the last line of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = zip(frames, _packages_of(error), strict=True)
    theirs = [f for f, package in own if package in _packages and f.filename[0] != "<"]
    at = (theirs or frames)[-1]
    return f"{Path(at.filename).name}:{at.lineno}"


def _packages_of(error: BaseException) -> list[str]:
    """For each frame of the traceback, the outermost first, the package that its code is of."""
    frames = traceback.walk_tb(error.__traceback__)
    return [str(f.f_globals.get("__name__", "")).partition(".")[0] for f, _ in frames]


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ends the process with {error.code!r}: raise an error instead"
    return " ".join(f"{type(error).__name__}: {error}".split())
