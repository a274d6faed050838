"""Corners of the exchange that ranks in good health never see."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from syncbn.norm import backends as kernels
from syncbn.norm.comm import arrival, processes
from syncbn.norm.comm.fingerprint import FORWARD, NAMED, RanksDisagree, packed
from syncbn.norm.comm.transports import shared_memory as shared
from syncbn.norm.functional import sync_batch_norm

HEADER = packed(FORWARD, NAMED, 3, torch.float32, True, 32, "bn")


class Alone(arrival.Arrival):
    """Rank 0 of two, whose store nobody else writes to."""

    _store = None

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(rank=0, ranks=[0, 1], world_size=2, timeout_s=0.2))
        self._store = dist.HashStore()


def test_a_rank_that_never_comes_is_given_up_at_the_time_limit_and_all_are_told():
    waiting = Alone()
    with pytest.raises(RanksDisagree, match=r"waits for rank 1: it did not come within 0.2 s"):
        waiting.wait(HEADER, 1)
    assert b"waits for rank 1" in waiting._store.get("syncbn/failed")


def test_a_rank_without_word_from_the_others_goes_on_to_the_collective(monkeypatch):
    monkeypatch.setattr(arrival, "SETTLE_S", 0.0)
    waiting = Alone()
    waiting.wait(HEADER, 1)
    assert not waiting._store.check(["syncbn/failed"])


def test_a_rank_that_comes_after_another_gave_up_hears_why():
    coming = Alone()
    coming._store.set("syncbn/failed", "rank 1 gave up")
    with pytest.raises(RanksDisagree, match="rank 1 gave up"):
        coming.wait(HEADER, 1)


def test_a_layer_that_is_passed_again_leaves_no_second_word():
    passing = Alone()
    passing.pass_by("bn", backward=False)
    passing._store.set("syncbn/passed/0/forward/bn", "as it was")
    passing.pass_by("bn", backward=False)
    assert passing._store.get("syncbn/passed/0/forward/bn") == b"as it was"


def test_what_proc_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch):
    assert processes._used_s(2**30) == 0.0
    assert processes._text(Path("/proc/nowhere")) == ""
    monkeypatch.setattr(processes.Path, "readlink", lambda self: Path("/nowhere").read_text())
    assert processes.machine() == b""


def test_a_library_without_exchanges_shares_no_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared, "library", lambda: None)
    assert shared._native.__wrapped__() is None


def test_an_average_over_all_batches_needs_their_number():
    with pytest.raises(ValueError, match="momentum=None needs num_batches_tracked"):
        sync_batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), momentum=None)


def test_tensors_elsewhere_are_left_to_torch():
    assert not kernels.faster_alone(torch.empty(2**10, 2**10, device="meta"))
