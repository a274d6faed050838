"""How a signal to the driver reaches ranks on other nodes: a small file beside the run, which every rank watches.

A file, because Ray Train needs storage that all nodes share anyway, and an actor would cost a process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from syncbn.launch.periodic import periodically
from syncbn.train.stopping import ask_to_stop, stop_on_signals

EVERY_S = 0.5


@contextmanager
def signals_written_to(path: Path) -> Iterator[None]:
    """Write the number of the first signal to stop into `path`; a second one ends this process at once."""
    with stop_on_signals() as request:

        def write() -> None:
            if request.signal_number and not path.exists():
                path.write_text(str(request.signal_number))

        with periodically(write, EVERY_S):
            yield


@contextmanager
def stopping_on(path: Path) -> Iterator[None]:
    """Ask this process's training loop to stop once `path` names a signal."""

    def read() -> None:
        with suppress(OSError, ValueError):
            ask_to_stop(int(path.read_text()))

    with periodically(read, EVERY_S):
        yield
