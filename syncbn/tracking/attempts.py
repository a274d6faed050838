"""What a journal says of a run's attempts, and what is added to it for one that could not do so itself.

An attempt begins with a `start` record and ends with an `end`. A rank that is killed writes none: whatever started it
appends the `end`, or the next attempt does. Between two attempts of one launch stands a `restart`, which says why.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn.tracking.journal import is_open, read_journal

Record = dict[str, Any]


def records_of(path: Path) -> list[Record]:
    """The records of the journal `path`; none where it is missing or cannot be read."""
    try:
        return list(read_journal(path))
    except (OSError, ValueError):
        return []


def has_saved_since(path: Path, since: float) -> bool:
    """Whether the run whose journal `path` was begun after `since` (seconds since the epoch) has a checkpoint."""
    records = records_of(path)
    ours = bool(records) and records[0].get("time", 0.0) >= since
    return ours and any(record.get("event") == "checkpoint" for record in records)


def close_attempt(path: Path, since: float, status: str, reason: str) -> bool:
    """Append the `end` that the last attempt in the journal `path` lacks; whether it did.

    Args:
        path: of a journal that nothing writes any more.
        since: attempts that began earlier (seconds since the epoch) are left as they are.
        status: `failed` or `stopped`.
        reason: in one line.
    """
    records = records_of(path)
    if not (_of_this_launch(records, since) and is_open(records)):
        return False
    _append(path, {"event": "end", "status": status, "summary": None, "error": reason})
    return True


def note_restart(path: Path, since: float, reason: str, from_step: int) -> None:
    """Append that the next attempt goes on from `from_step`, because the last one ended of `reason`.

    The journal is then kept also where that is step 0, so that the attempts stay one run. See `close_attempt` for
    the other arguments.
    """
    records = records_of(path)
    if not _of_this_launch(records, since):
        return
    attempts = [r["attempt"] for r in records if r.get("event") == "start"]
    number = 1 + sum(r.get("event") == "restart" for r in records)
    _append(
        path,
        {
            "event": "restart",
            "number": number,
            "attempt": attempts[-1],
            "reason": reason,
            "from_step": from_step,
        },
    )


def _of_this_launch(records: Sequence[Record], since: float) -> bool:
    starts = [record["time"] for record in records if record.get("event") == "start"]
    return bool(starts) and starts[-1] >= since


def _append(path: Path, record: Record) -> None:
    """Append `record`, in place of a last line that a kill left unfinished."""
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(record | {"time": time.time()}).encode() + b"\n")
