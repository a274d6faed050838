"""Loader processes: whose signals they heed, and what the rank learns when they fail or die."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as DataLoaderIter

from syncbn.data.loaders import Loading, fetched
from syncbn.errors import DataError, InfrastructureError, exit_code
from syncbn.signals import STOPPING

KEYS = [(step, torch.tensor([step])) for step in range(4)]


def pids(step: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the process that fetched it."""
    return torch.tensor([os.getpid()]), indices


def test_batches_come_in_order_from_as_many_processes_as_asked_for():
    loaded = list(fetched(pids, KEYS, Loading(2)))
    assert [int(at) for _, at in loaded] == [0, 1, 2, 3]
    processes = {int(pid) for pid, _ in loaded}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {int(pid) for pid, _ in fetched(pids, KEYS, Loading(0))} == {os.getpid()}


def test_a_loader_leaves_signals_to_its_rank():
    batches = fetched(pids, KEYS, Loading(1))
    loader = int(next(batches)[0])
    other = os.fork()  # a signal of a third process, as of one that stops the whole group
    if other == 0:
        for number in STOPPING:
            os.kill(loader, number)
        os._exit(0)
    os.waitpid(other, 0)
    assert [int(pid) for pid, _ in batches] == [loader] * 3


def parents(step: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([os.getppid()]), indices


def test_a_loader_is_a_child_of_its_rank_however_the_rank_was_started():
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # as in ranks that a server forked
    try:
        assert {int(pid) for pid, _ in fetched(parents, KEYS, Loading(1))} == {os.getpid()}
    finally:
        multiprocessing.set_start_method(method, force=True)


def blocked(step: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))), indices


def test_no_signal_to_all_processes_reaches_a_loader_before_it_is_ready():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    mask, _ = next(batches := fetched(blocked, KEYS, Loading(1)))
    assert set(STOPPING) <= set(mask.tolist())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    list(batches)


def killed_at_2(step: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return pids(step, indices)


def test_a_killed_loader_is_named_and_the_same_command_continues():
    with pytest.raises(
        InfrastructureError, match=r"^(a )?loader process.* .* was lost, .*memory"
    ) as e:
        list(fetched(killed_at_2, KEYS, Loading(1)))
    assert exit_code(e.value) == 75
    assert "\n" not in str(e.value)


def test_a_batch_that_went_with_its_loader_tells_of_it_too(monkeypatch):
    batches = fetched(pids, KEYS, Loading(1))
    loader = int(next(batches)[0])

    def lost(*args: object) -> object:
        os.kill(loader, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(DataLoaderIter, "_next_data", lost)
    with pytest.raises(
        InfrastructureError, match=rf"^loader process {loader} \(killed by signal 9\)"
    ):
        next(batches)


def failing(step: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise DataError(f"sample {int(indices[0])} is torn")


def test_an_error_in_a_loader_is_the_ranks():
    with pytest.raises(DataError, match=r"^sample 0 is torn$"):
        list(fetched(failing, KEYS, Loading(1)))


def buggy(step: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("ours")


def test_a_bug_in_a_loader_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in buggy.*ours"):
        list(fetched(buggy, KEYS, Loading(1)))


def test_the_random_state_of_the_rank_is_left_alone_by_loaders():
    state = torch.get_rng_state()
    list(fetched(pids, KEYS, Loading(1)))
    assert torch.equal(torch.get_rng_state(), state)
