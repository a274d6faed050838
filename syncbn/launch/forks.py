"""Ranks of this machine as forks of one process that has imported what they need.

An interpreter of its own for each rank would import torch and, once it makes an optimiser, torch's compiler: 4 s of a
core. Python's fork server imports both once, while the program that starts it imports what it needs itself; its forks
share that memory. Nothing else happens in the server, so it has no threads and has not touched a GPU.
"""

import atexit
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import (
    active_children,
    forkserver,
    get_context,
    parent_process,
    resource_tracker,
)
from multiprocessing.process import BaseProcess

import psutil

from syncbn.errors import InfrastructureError
from syncbn.signals import STOPPING

PRELOADED = ["torch._dynamo", "syncbn.launch.local"]

RANK_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
}
"""glibc keeps freed memory in the process: giving large results back at once costs page faults at every step, up to
half of a large layer's time (docs/performance.md)."""

SAVING_S = 30.0

_OF_THE_SERVER = dict(os.environ)
"""In a fork: the environment that the server was started in."""


def start_server(num_threads: int) -> None:
    """Let the server begin to import, unless it runs; returns at once.

    It blocks signals, and so do its forks until they call `listen`: a signal to all processes of the terminal or job
    must not end the server before its ranks, and one to a rank must not come before its handler.

    Args:
        num_threads: threads of each rank.
    """
    for name, value in (RANK_ENVIRONMENT | {"OMP_NUM_THREADS": str(num_threads)}).items():
        os.environ.setdefault(name, value)
    forkserver.set_forkserver_preload(PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()  # which unblocks some when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.unregister(_end_server)
    atexit.register(_end_server, os.getpid())


def _end_server(starter: int) -> None:
    """End the server with the program `starter`, whose output it would hold open while its interpreter ends: 1 s."""
    server: int | None = forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
    if server is not None and os.getpid() == starter:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def wait_for_server() -> None:
    """Return once the server has imported everything and forks at once.

    Raises:
        InfrastructureError: it has died.
    """
    first = get_context("forkserver").Process(target=_return)
    try:
        first.start()
    except (EOFError, OSError) as error:
        raise InfrastructureError(
            "the process that ranks are forked from died: start it again"
        ) from error
    first.join()


def _return() -> None:
    """What the first fork does."""


def end_forks(signal_number: int) -> None:
    """Hand a signal on to ranks that torchrun's agent does not know: it came while the agent was starting them.

    They have `SAVING_S` to save and to leave; torchrun allows its own as much.
    """
    for rank in active_children():
        assert rank.pid is not None
        os.kill(rank.pid, signal_number)
        rank.join(SAVING_S)
        rank.kill()


def end_stopped_forks() -> None:
    """Kill ranks that are stopped: no signal to end reaches them, and torchrun's agent would wait for half a minute."""
    server: int | None = forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
    with suppress(psutil.NoSuchProcess):
        for rank in psutil.Process(server).children():
            if rank.status() == psutil.STATUS_STOPPED:
                rank.kill()


def take_environment(environ: Mapping[str, str]) -> None:
    """In a rank: have `environ`, that of the process that started it, which may have changed since the server was.

    What torchrun's agent has set besides stays.
    """
    by_agent = {n: v for n, v in os.environ.items() if _OF_THE_SERVER.get(n) != v}
    os.environ.clear()
    os.environ.update({**environ, **by_agent})


def listen() -> None:
    """In a rank that has handlers for signals: let them come, and one more when the process that started it is gone.

    Raises:
        SystemExit: it is gone already.
    """
    starter = parent_process()
    assert starter is not None
    if not starter.is_alive():
        raise SystemExit(128 + signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    threading.Thread(target=_interrupted_after, args=(starter,), daemon=True).start()


def _interrupted_after(starter: BaseProcess) -> None:
    starter.join()
    os.kill(os.getpid(), signal.SIGINT)
