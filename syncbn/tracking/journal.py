"""The journal of a run: one JSON object a line, appended and flushed; only a new attempt cuts it back, at one stroke.

Records are `{"step": n, "metrics": {...}, "time": t}` and `{"event": name, ..., "time": t}`, with `time` in
seconds since the epoch. Floats round-trip exactly (shortest repr); NaN and infinities are written as the
strings "nan", "inf" and "-inf", which JSON has no numbers for.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

KILLED = "the attempt ended without a message: its process was killed, or its machine was lost"
"""What is said of an attempt that left no `end` and of which nothing else is known."""


class Tracker(Protocol):
    """What the training loop reports to."""

    begun: bool
    """Whether there is an attempt, since `begin`, that an end can be recorded of."""

    def begin(self, step: int, **fields: Any) -> None:
        """Record the start of an attempt from `step`; what was recorded beyond it is void."""
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` as measured after `step` optimiser steps."""
        ...

    def event(self, name: str, **fields: Any) -> None:
        """Record that something happened once: `start`, `checkpoint`, `end`, ..."""
        ...

    def close(self) -> None:
        """Record nothing more."""
        ...


class Untracked:
    """The tracker of ranks that do not write."""

    begun = False

    def begin(self, step: int, **fields: Any) -> None:
        """Drop the fields."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Drop the values."""

    def event(self, name: str, **fields: Any) -> None:
        """Drop the event."""

    def close(self) -> None:
        """Nothing is open."""


class Journal:
    """Appends records to `path`, a line each, flushed to the operating system at once.

    Args:
        path: the journal's file; its folder is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.begun = False
        self._file = path.open("a")

    def begin(self, step: int, **fields: Any) -> None:
        """Append a `start` record with its `attempt`, counted from 1.

        Metrics beyond `step` are cut off first, as is a last line that a crash left unfinished; an attempt before that
        was killed gets the `end` that it lacks. An attempt from step 0 starts the journal anew, unless its last record
        is a `restart`; its `supersedes` is the time at which the journal it replaces began. A reader, or a kill of
        this process, meanwhile finds the earlier journal whole, or the new one.
        """
        kept = _kept(self.path, step)
        began = None if step > 0 or kept else _began(self.path)
        if began is not None:
            fields["supersedes"] = began
        attempt = 1 + sum(record.get("event") == "start" for record in kept)
        start = {"event": "start", **fields, "attempt": attempt, "time": time.time()}
        self._file.close()
        _replace(self.path, "".join(map(_line, [*kept, start])))
        self._file = self.path.open("a")
        self.begun = True

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one metrics record."""
        self._append({"step": step, "metrics": {k: number(v) for k, v in values.items()}})

    def event(self, name: str, **fields: Any) -> None:
        """Append one event record."""
        self._append({"event": name, **fields})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record | {"time": time.time()}))
        self._file.flush()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a journal in order; a last line without its newline is not a record yet."""
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _kept(path: Path, step: int) -> list[dict[str, Any]]:
    """What of the journal `path` an attempt from `step` goes on with."""
    try:
        records = list(read_journal(path))
    except (OSError, ValueError):
        if step > 0:
            raise
        return []
    if step > 0:
        kept = [record for record in records if record.get("step", 0) <= step]
    elif records and records[-1].get("event") == "restart":
        kept = [record for record in records if "step" not in record]
    else:
        kept = []
    return [*kept, *_missing_end(kept)]


def is_open(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last attempt in `records` has no `end`."""
    events = [record["event"] for record in records if record.get("event") in ("start", "end")]
    return bool(events) and events[-1] == "start"


def _missing_end(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `end` of the last attempt in `records`, where it left none."""
    if not is_open(records):
        return []
    end = {"event": "end", "status": "failed", "summary": None, "error": KILLED}
    return [end | {"time": records[-1].get("time", 0.0)}]


def _began(path: Path) -> float | None:
    """Time of the journal's first record; None where it has none, or not one that can be read."""
    try:
        return next(read_journal(path))["time"]
    except (StopIteration, ValueError, KeyError):
        return None


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def number(value: float) -> float | str:
    """`value` as JSON has it; "nan", "inf" or "-inf" where JSON has no number for it."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)
