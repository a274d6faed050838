"""Runs that are asked to stop at a step of the test's choice, without a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from syncbn.train.loop import Loop


@contextmanager
def asked_to_stop_at(step: int) -> Iterator[None]:
    """Within, all ranks of a run know after `step` that SIGTERM asked one of them to stop."""
    real = Loop._agree

    def agree(self: Loop, due: bool, at_once: bool) -> tuple[bool, int]:
        stopping = self.state.step == step
        late, asked = real(self, due, at_once or stopping)
        return late, signal.SIGTERM if stopping else asked

    with patch.object(Loop, "_agree", agree):
        yield
