"""Standard output whose reader may go away without ending the training.

A pager that is closed, a full disk behind a redirection, a descriptor that was never open: nobody reads any more, but
the run goes on. At the first failed write the descriptor is pointed at /dev/null, which serves every later writer too:
child processes, libraries, and the interpreter's own flush at exit.
"""

import os
import sys
from typing import Any, TextIO


class Unbreakable:
    """A text stream like `stream`, whose writes and flushes never raise."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it where nobody reads any more."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_unbreakable() -> None:
    """Let stdout and stderr of this process, and of its children, survive their readers."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(1 if name == "stdout" else 2, "w", closefd=False)
        if not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream))
