"""Signals become a request that ranks agree on: finish the step, save, and leave with 130 (SIGINT) or 143.

A request lasts as long as the outermost `stop_on_signals`: a study holds one around all its trials, so that a signal
which reaches a trial after its last agreement is not lost with it.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from syncbn.errors import Stopped
from syncbn.signals import as_stop, heeded

REPEAT_S = 1.0
"""A second signal sooner than this is the first one again: a terminal's Ctrl-C comes from the launcher as well."""


class StopRequest:
    """The signal that asked this rank to stop, SIGINT or SIGTERM, or 0; the others of `STOPPING` count as SIGTERM."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._first_at = 0.0

    def ask(self, signal_number: int, _frame: FrameType | None) -> None:
        """Remember the request; a second one ends the process at once."""
        now = time.monotonic()
        if self.signal_number == 0:
            self.signal_number, self._first_at = as_stop(signal_number), now
        elif now - self._first_at > REPEAT_S:
            signal.signal(signal_number, signal.SIG_DFL)
            signal.raise_signal(signal_number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the signals of `STOPPING` into a `StopRequest` while the context lasts; within another, into its request.

    Outside the main thread, as in a Ray worker, Python allows no handlers, and `ask_to_stop` takes their place.
    """
    if _open:
        yield _open[0]
        return
    request = StopRequest()
    _open.append(request)
    try:
        with _handled_by(request):
            yield request
    finally:
        _open.remove(request)


@contextmanager
def _handled_by(request: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, request.ask) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within, a signal ends the process at once: for waits in which Python's handlers do not run, before a first step.

    Raises:
        Stopped: a signal has come already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heeded()}
    try:
        for request in _open:
            if request.signal_number:
                raise Stopped(request.signal_number, saved=False)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask_to_stop(signal_number: int) -> None:
    """Pass on a signal that another process received to what runs in this one."""
    for request in _open:
        request.signal_number = signal_number


_open: list[StopRequest] = []
"""The request of the outermost context, or nothing."""
