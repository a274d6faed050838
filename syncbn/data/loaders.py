"""Batches fetched by the rank itself, or by loader processes beside it, which work ahead of it.

What a loader is sent is a step and the indices of its samples, and what it sends back is the batch, or the error that
is the rank's to raise. A loader ends with its rank and by its rank's word only: signals that reach the whole process
group are left to the rank, which saves a checkpoint for them.
"""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.data.sent_batch import SentBatch, pickled
from syncbn.errors import InfrastructureError, SyncbnError
from syncbn.extensions import failures_named
from syncbn.signals import STOPPING, held_back
from syncbn.structure import mapped

Key = tuple[int, Tensor]
"""A step and the indices of its samples, int64 (n,)."""
Fetch = Callable[[int, Tensor], tuple[Tensor, Any]]
"""Inputs and targets of the samples of a step."""

ENDING_S = 1.0
"""A process that is ending closes its connections this much, at most, before it can be seen to have ended."""


@dataclass(frozen=True)
class Loading:
    """How batches come to a rank.

    Args:
        num_loaders: processes that fetch them; 0 has the rank do it.
        pin_memory: whether they are copied to page-locked memory.
    """

    num_loaders: int = 0
    pin_memory: bool = False


def fetched(fetch: Fetch, keys: Iterable[Key], loading: Loading) -> Iterator[tuple[Tensor, Any]]:
    """The batch of each of `keys`, in order.

    Loaders work up to two batches each ahead, and read `keys` as far.

    Raises:
        SyncbnError: what `fetch` raises, here or in a loader.
        InfrastructureError: a loader was killed.
    """
    if loading.num_loaders:
        return _from_loaders(fetch, keys, loading)
    return pinned((fetch(step, indices) for step, indices in keys), loading.pin_memory)


def pinned(batches: Iterable[tuple[Tensor, Any]], wanted: bool) -> Iterator[tuple[Tensor, Any]]:
    """`batches`, in page-locked memory where that is `wanted`."""
    for x, target in batches:
        yield mapped((x, target), Tensor.pin_memory) if wanted else (x, target)


def _from_loaders(
    fetch: Fetch, keys: Iterable[Key], loading: Loading
) -> Iterator[tuple[Tensor, Any]]:
    loader = DataLoader(
        _Batches(fetch),
        batch_size=None,  # an item is a whole batch
        sampler=((step, indices.numpy()) for step, indices in keys),  # sent without /dev/shm
        num_workers=loading.num_loaders,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_rank,
        pin_memory=loading.pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
        multiprocessing_context="fork",  # not as the rank was started, which may be by a server that a signal ends
    )
    batches, loaders = _started(loader)
    try:
        for sent in batches:
            # where memory is pinned, torch has received it already
            batch = sent.received() if isinstance(sent, SentBatch) else sent
            if isinstance(batch, SyncbnError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        lost = _lost(error, loaders)
        if lost is None:
            raise
        raise lost from error


def _started(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """What `loader` gives, and its processes.

    Raises:
        InfrastructureError: `/dev/shm` is full.
    """
    before = set(active_children())
    try:
        _try_locks(8 + 4 * loader.num_workers)
        with held_back(), _without_torchs_handler():
            batches = iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InfrastructureError(
            "loaders cannot be started, because /dev/shm is full: free it, give a container more (docker run "
            "--shm-size=2g), or set data.num_loaders=0"
        ) from error
    return batches, [process for process in active_children() if process not in before]


class _Batches(Dataset[Any]):
    """Batches by key, ready to be sent; a failure with a message of its own comes as it is, without a traceback."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def __getitem__(self, key: tuple[int, Any]) -> SentBatch:
        step, indices = key
        try:
            with failures_named():
                return pickled(self._fetch(step, torch.from_numpy(indices)))
        except SyncbnError as error:
            return pickled(error)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_rank(_loader: int) -> None:
    """In a loader, which starts with all of `STOPPING` blocked: heed SIGTERM from the rank alone."""
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_when_the_rank_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_rank_says(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


def _try_locks(number: int) -> None:
    """Make as many locks as loaders need at most: torch prints a traceback where it finds no room for its own."""
    context = get_context("fork")
    _ = [context.Lock() for _ in range(number)]


@contextmanager
def _without_torchs_handler() -> Iterator[None]:
    """Within, loaders may be started; torch's handler of SIGCHLD does not stay.

    It would raise in whatever the rank does when a loader dies. Without it, the wait for a batch tells, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _lost(error: Exception, loaders: list[BaseProcess]) -> InfrastructureError | None:
    """Which of `loaders` died, as an error of ours; None where all live, and `error` is what one of them raised.

    Torch finds one dead, or fails first to fetch the memory of its last batch, which went with it.
    """
    if "in DataLoader worker process" in str(error):
        return None
    ended = wait([loader.sentinel for loader in loaders], ENDING_S)
    dead = [loader for loader in loaders if loader.sentinel in ended]
    if not dead:
        return None
    which = ", ".join(f"{loader.pid} ({_end_of(loader)})" for loader in dead)
    return InfrastructureError(
        f"loader process {which} was lost, most often for lack of memory: with fewer data.num_loaders or a smaller "
        "train.per_rank_batch the same command continues from the latest checkpoint"
    )


def _end_of(loader: BaseProcess) -> str:
    loader.join()
    code = loader.exitcode or 0
    return f"exit {code}" if code >= 0 else f"killed by signal {-code}"
