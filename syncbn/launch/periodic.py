"""A function that a thread calls at intervals."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def periodically(job: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `job` in a thread every `every_s` seconds while the context lasts; the thread ends with it."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(every_s):
            job()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
