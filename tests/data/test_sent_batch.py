"""How a batch comes from a loader process: whole, wherever there is room for it, or with an error, never not at all."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.data import sent_batch
from syncbn.data.loaders import Loading, fetched
from syncbn.errors import InfrastructureError, UsageError
from syncbn.structure import tensors_of

KEYS = [(step, torch.tensor([step])) for step in range(4)]
BATCH = {
    "x": torch.arange(6.0).view(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
    "sizes": [torch.tensor(3), torch.tensor([1, 2])],
    "name": "a",
}


def alike(step: int, indices: torch.Tensor) -> Any:
    return BATCH, indices


def no_room(*_: object) -> None:
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
    )


def assert_whole(loaded: list[Any]) -> None:
    assert [int(indices) for _, indices in loaded] == [0, 1, 2, 3]
    for batch, _ in loaded:
        assert batch["name"] == "a"
        assert all(map(torch.equal, tensors_of(batch), tensors_of(BATCH)))
        assert [one.dtype for one in tensors_of(batch)] == [one.dtype for one in tensors_of(BATCH)]


def test_a_batch_comes_whole_and_in_shared_memory(capfd):
    assert_whole(loaded := list(fetched(alike, KEYS, Loading(2))))
    assert loaded[0][0]["x"].is_shared()
    assert not capfd.readouterr().err


def test_a_batch_without_room_in_shared_memory_comes_whole_and_is_spoken_of_once(
    monkeypatch, capfd
):
    sent_batch._warn.cache_clear()
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    assert_whole(list(fetched(alike, KEYS, Loading(2))))
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: /dev/shm has no room")
    assert "--shm-size" in line


@pytest.mark.parametrize("room", [True, False])
def test_descriptors_of_batches_are_closed(monkeypatch, room):
    sent_batch.pickled(BATCH).received()  # starts what sends descriptors
    if not room:
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        sent_batch.pickled({"x": torch.ones(3)}).received()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def with_a_function(step: int, indices: torch.Tensor) -> Any:
    return indices, lambda: step


def test_a_batch_that_cannot_be_sent_is_an_error_not_a_wait():
    with pytest.raises(UsageError, match=r"cannot be sent .*pickle.* data\.num_loaders=0"):
        list(fetched(with_a_function, KEYS, Loading(1)))


def test_full_shared_memory_is_named_where_loaders_cannot_be_started(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", full)
    with pytest.raises(InfrastructureError, match=r"/dev/shm is full: .*--shm-size"):
        list(fetched(alike, KEYS, Loading(1)))


LARGE = """
import torch
from syncbn.data.loaders import Loading, fetched
def large(step, indices): return torch.full((2**20,), float(step)), indices
keys = [(step, torch.tensor([step])) for step in range(12)]
print([int(x[-1]) for x, _ in fetched(large, keys, Loading(2))])
"""


def mounting() -> bool:
    """Whether this machine lets us have a `/dev/shm` of our own."""
    asked = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(asked, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not mounting(), reason="needs root, for a mount of its own")
@pytest.mark.parametrize("size", ["6m", "64k"])
def test_loaders_work_in_a_container_with_little_shared_memory(size):
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mounted, "sh", sys.executable, "-c", LARGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{list(range(12))}\n", done.stderr
    assert done.stderr.count("warning: /dev/shm has no room") == 1
