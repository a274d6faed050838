"""What a trial failed of, kept in its folder while other trials go on.

It is no outcome: the same command tries the trial again.
"""

import json
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from syncbn.errors import exit_code
from syncbn.tracking.redact import redact_text

_FILE, _LOG = "failure.json", "error.log"

_OF_THE_TRIAL = (1, 2, 3, 4, 5, 8)
"""Exit codes that another trial need not share: neither a signal, nor a service or a machine that is gone."""


@dataclass(frozen=True)
class Failure:
    """How a trial failed."""

    exit_code: int
    error: str
    """In one line."""


def of_the_trial(error: Exception) -> bool:
    """Whether `error` says something of the trial that raised it, and nothing of those after it."""
    return exit_code(error) in _OF_THE_TRIAL


def note_failure(folder: Path, error: Exception) -> None:
    """Keep `error` in `folder`, with the traceback that there is of it."""
    text = str(error) if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"
    failure = Failure(exit_code(error), redact_text(" ".join(text.split())))
    folder.mkdir(parents=True, exist_ok=True)
    details = getattr(error, "details", "") or "".join(traceback.format_exception(error))
    (folder / _LOG).write_text(redact_text(details))
    beside = folder / f".{_FILE}"
    beside.write_text(json.dumps(asdict(failure)))
    beside.replace(folder / _FILE)


def failure_in(folder: Path) -> Failure | None:
    """The failure noted in `folder`, None where there is none."""
    try:
        return Failure(**json.loads((folder / _FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget_failure(folder: Path) -> None:
    """Let the trial in `folder` be tried again."""
    (folder / _FILE).unlink(missing_ok=True)
