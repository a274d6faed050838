"""Batches fetched by the rank itself, or by loader processes beside it, which work ahead of it.

What a loader is sent is a step and the indices of its samples, and what it sends back is the batch, or the error that
is the rank's to raise. A loader ends with its rank and by its rank's word only: signals that reach the whole process
group are left to the rank, which saves a checkpoint for them.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.errors import InfrastructureError, SyncbnError
from syncbn.extensions import failures_named
from syncbn.signals import STOPPING
from syncbn.structure import mapped

Key = tuple[int, Tensor]
"""A step and the indices of its samples, int64 (n,)."""
Fetch = Callable[[int, Tensor], tuple[Tensor, Any]]
"""Inputs and targets of the samples of a step."""


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
        sampler=keys,
        num_workers=loading.num_loaders,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_rank,
        pin_memory=loading.pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    try:
        with _without_torchs_handler():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, SyncbnError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        killed = _killed(error)
        if killed is None:
            raise
        raise killed from error


class _Batches(Dataset[Any]):
    """Batches by key; a failure with a message of its own is handed over as it is, without a process's traceback."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def __getitem__(self, key: Key) -> Any:
        try:
            with failures_named():
                return self._fetch(*key)
        except SyncbnError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_rank(_loader: int) -> None:
    """In a loader: ignore what asks a run to stop, and heed SIGTERM from the rank alone."""
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_rank_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_rank_says(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


@contextmanager
def _without_torchs_handler() -> Iterator[None]:
    """Within, loaders may be started; torch's handler of SIGCHLD does not stay.

    It would raise in whatever the rank does when a loader dies. Without it, the wait for a batch tells, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _killed(error: Exception) -> InfrastructureError | None:
    """What shows that a loader is dead, as an error of ours; None where `error` is another.

    Torch finds it dead, or fails first to fetch the memory of its last batch, which went with it.
    """
    text = str(error)
    dead = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
    lost = not isinstance(error, RuntimeError) and "in DataLoader worker process" not in text
    if dead is None and not lost:
        return None
    which = f"loader process {dead[1]}" if dead else "a loader process"
    return InfrastructureError(
        f"{which} was killed, most often for lack of memory: with fewer data.num_loaders or a smaller "
        "train.per_rank_batch the same command continues from the latest checkpoint"
    )
