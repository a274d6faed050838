"""The one place where errors become a line on stderr and an exit code.

Every entry point runs through `invoke`. An error that carries an exit code is printed as one line; anything else is a
bug of ours, and shows its traceback unless a run's log already has it.
"""

import atexit
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from syncbn.cli.hydra_flags import explain
from syncbn.cli.torchrun import is_first_to_fail
from syncbn.errors import UsageError, exit_code, in_words, of_rank
from syncbn.extensions import failures_named
from syncbn.launch.streams import make_unbreakable
from syncbn.tracking.redact import redact_text


def invoke(command: click.Command, argv: Sequence[str], prog_name: str | None = None) -> int:
    """Run `command` with the arguments `argv` and return its exit code; never raises."""
    make_unbreakable()
    atexit.register(_spare_the_search)
    try:
        _require_current_folder()
        with failures_named():
            return int(command.main(list(argv), prog_name=prog_name, standalone_mode=False) or 0)
    except click.NoSuchOption as error:
        instead = explain(argv, error.option_name)
        return _complain(UsageError(instead or error.format_message()))
    except click.ClickException as error:
        return _complain(UsageError(error.format_message()))
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        return _complain(error)


def _spare_the_search() -> None:
    """Let the interpreter end without a search for rubbish in all that torch has made, which takes 0.7 s.

    Not where Triton is imported: its library lists on stderr whatever of its own was not found.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def _require_current_folder() -> None:
    """Raise `UsageError` where the current folder has been deleted: relative paths have no meaning then."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the current folder cannot be read ({error.strerror}): change into one that is there"
        ) from error


def _complain(error: Exception) -> int:
    """Say on stderr what went wrong, once however many ranks of this machine fail, and return the exit code."""
    if is_first_to_fail(os.environ, exit_code(error), _one_line(error)):
        if exit_code(error) == 1 and not hasattr(error, "__notes__"):
            click.echo(_details(error), err=True)
        click.echo(f"syncbn: error: {_one_line(error)}", err=True)
    return exit_code(error)


def _details(error: Exception) -> str:
    """The traceback behind `error` without secrets: the rank's, where it comes from one."""
    return redact_text(getattr(error, "details", "") or "".join(traceback.format_exception(error)))


def _one_line(error: Exception) -> str:
    rank = of_rank(error)
    where = [] if rank is None else [f"rank {rank}:"]
    parts = [*where, in_words(error), *getattr(error, "__notes__", [])]
    return redact_text(" ".join(" ".join(parts).split()))


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Keep the traceback of a failure within in `folder`/error.log, where `folder` can be written to."""
    try:
        yield
    except Exception as error:
        if exit_code(error) < 128:  # a signal is no failure
            _keep(error, folder / "error.log")
        raise


def _keep(failure: Exception, log: Path) -> None:
    """Write the traceback to `log`; where the failure is a bug, say so with it."""
    with suppress(OSError):
        log.write_text(_details(failure))
        if exit_code(failure) == 1:
            failure.add_note(f"(traceback in {log})")


def say(value: dict[str, Any] | list[Any], text: str, as_json: bool) -> None:
    """Print `value` as JSON, or `text` for people."""
    sys.stdout.write((json.dumps(value, indent=2) if as_json else text) + "\n")
    sys.stdout.flush()
