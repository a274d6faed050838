"""Runs whose checkpoints are on the disk when training goes on, so that no test depends on how long a write takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from syncbn.checkpoint import Background


@contextmanager
def written_at_once() -> Iterator[None]:
    """Within, a write has ended when the step after its copy begins."""
    real = Background.start

    def start(self: Background[Any], work: Callable[[], Any]) -> None:
        real(self, work)
        assert self._thread is not None
        self._thread.join()

    with patch.object(Background, "start", start):
        yield
