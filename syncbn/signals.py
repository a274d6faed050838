"""The signals on which a run saves a checkpoint and stops."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; the usual request to end; a terminal that is closed; what Slurm's --signal and its like warn with."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of `STOPPING` that this process is to act on: SIGHUP not where `nohup` has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(n for n in STOPPING if not (ignored and n == signal.SIGHUP))


def as_stop(signal_number: int) -> int:
    """SIGINT as itself (exit code 130), every other as SIGTERM (143)."""
    return int(signal.SIGINT if signal_number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """Within, `STOPPING` wait for this thread, and never reach processes that it starts: a run ends those itself.

    A terminal, a queue or a service manager signals all processes of a job. Only ranks are to act on it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
