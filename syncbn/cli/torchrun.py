"""What ranks that torchrun started on one machine leave for each other, and for those that it starts in their place.

torchrun gives each rank a file for its error: `.../attempt_N/<rank>/error.json`. Beside the folders of an attempt's
ranks the first that fails leaves what it failed of, so that one line is said however many fail, and so that a mistake
is not made again: `--max-restarts` starts ranks anew whatever they failed of.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from syncbn.errors import RankFailed

FAILURE = "syncbn-failure.json"
MISTAKES = (1, 2, 3, 4, 5, 7, 8)
"""Exit codes that another attempt cannot change."""
AGAIN = " (torchrun started its ranks again, which cannot change that)"


def is_first_to_fail(environ: Mapping[str, str], code: int, line: str) -> bool:
    """Whether no other rank that torchrun started here has failed before: the first to fail names the cause.

    Args:
        environ: of the process.
        code: its exit code.
        line: what it failed of.
    """
    attempt = _attempt(environ)
    if attempt is None:
        return True
    try:
        with (attempt / FAILURE).open("x") as file:
            json.dump({"exit_code": code, "line": line}, file)
    except OSError:
        return False
    return True


def refuse_mistake_again(environ: Mapping[str, str]) -> None:
    """Raise what the attempt before, of the same torchrun, failed of, where a person has to mend it.

    Raises:
        RankFailed: its exit code and what it said.
    """
    attempt = _attempt(environ)
    number = None if attempt is None else re.fullmatch(r"attempt_(\d+)", attempt.name)
    if attempt is None or number is None or int(number[1]) == 0:
        return
    with suppress(OSError, ValueError):
        before = attempt.parent / f"attempt_{int(number[1]) - 1}" / FAILURE
        failure = json.loads(before.read_text())
        if failure["exit_code"] in MISTAKES:
            line = str(failure["line"]).removesuffix(AGAIN)
            raise RankFailed(line + AGAIN, failure["exit_code"])


def _attempt(environ: Mapping[str, str]) -> Path | None:
    """The folder of the attempt that this process is a rank of; None where torchrun did not start it."""
    file = environ.get("TORCHELASTIC_ERROR_FILE")
    return None if file is None else Path(file).parent.parent
