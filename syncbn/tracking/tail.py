"""Follows a journal that another thread or process still writes.

The place reached is kept in memory only, together with the last line read. Where that line no longer stands where it
stood, the journal was cut back or begun anew, and reading starts over; what was sent before is recognised by its step,
so that costs time and changes nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """Records read together, and where reading goes on once they are sent."""

    records: list[dict[str, Any]]
    end: int
    """Bytes from the journal's start to behind the last of these records."""
    last_line: bytes
    starts_over: bool
    """Whether these are the journal's first records."""


class Tail:
    """The complete lines of the file `path` that have not been marked as done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._last_line = b""

    def has_new(self, chunk: Chunk) -> bool:
        """Whether `chunk` goes beyond what is done, be it with lines that are no records."""
        return chunk.end > self._offset

    def restart(self) -> None:
        """Begin again at the first line."""
        self._offset, self._last_line = 0, b""

    def read(self, limit: int) -> Chunk:
        """Up to `limit` next records; none where the file is missing. Lines that are no JSON object are left out."""
        if not self.path.exists():
            return Chunk([], self._offset, self._last_line, starts_over=False)
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._last_line))
            if file.read(len(self._last_line)) != self._last_line:
                self.restart()
                file.seek(0)
            starts_over = self._offset == 0
            lines = [
                line for _, line in zip(range(limit), file, strict=False) if line.endswith(b"\n")
            ]
        last_line = lines[-1] if lines else self._last_line
        return Chunk(_records(lines), self._offset + sum(map(len, lines)), last_line, starts_over)

    def done(self, chunk: Chunk) -> None:
        """Go on behind `chunk`."""
        self._offset, self._last_line = chunk.end, chunk.last_line

    def num_left(self) -> int:
        """Complete lines not yet done."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            return file.read().count(b"\n")


def _records(lines: list[bytes]) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
