"""The first exchange of a group: ranks that never come to it, and transports that cannot be had."""

import os
import resource
import time
from contextlib import contextmanager, suppress

import pytest
import torch
import torch.distributed as dist

from syncbn.norm.comm import processes, rendezvous
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of
from syncbn.norm.comm.fingerprint import NAMED, RankLost, RanksDisagree, packed, text_of
from syncbn.norm.comm.transports.process_group import Group
from syncbn.norm.native import library

HEADER = packed(FORWARD, NAMED, 32, Fingerprint("bn", 3, torch.float32, True))


class Alone:
    """Rank 0 of two, whose store no other rank writes to."""

    def __init__(self, timeout_s=0.2):
        self.name, self.rank, self.ranks, self.world_size = "alone", 0, [0, 1], 2
        self.timeout_s, self.processes = timeout_s, []
        self.turn = HEADER, 1
        self.store = dist.HashStore()
        self.store.set("syncbn/here/0", "")

    def here(self):
        return f"rank 0 {text_of(*self.turn)}"


def test_a_rank_that_never_comes_is_given_up_at_the_time_limit_and_all_are_told():
    group = Alone()
    with pytest.raises(RanksDisagree, match=r"waits for rank 1: it did not come within 0.2 s"):
        rendezvous._wait_for_all(group)
    assert b"waits for rank 1" in group.store.get("syncbn/failed")


def test_a_rank_without_a_sign_of_life_from_the_others_goes_on_to_the_collective(monkeypatch):
    monkeypatch.setattr(rendezvous, "SETTLE_S", 0.0)
    group = Alone(timeout_s=60.0)
    rendezvous._wait_for_all(group)
    assert not group.store.check(["syncbn/failed"])


@pytest.mark.parametrize(("kind", "error"), [("lost", RankLost), ("disagree", RanksDisagree)])
def test_a_rank_that_comes_after_another_gave_up_hears_why(kind, error):
    group = Alone()
    group.store.set("syncbn/failed", f"{kind} rank 1 gave up")
    with pytest.raises(error, match=r"^rank 1 gave up$"):
        rendezvous._wait_for_all(group)


def test_nobody_is_waited_for_when_all_are_there(monkeypatch):
    group = Alone()
    for rank in (0, 1):
        group.store.set(f"syncbn/here/{rank}", "")
    begun = []
    monkeypatch.setattr(rendezvous, "Wait", begun.append)
    rendezvous._wait_for_all(group)
    assert not begun


def test_a_transport_that_does_not_exist_is_refused_before_any_rank_is_waited_for(monkeypatch):
    monkeypatch.setenv("SYNCBN_EXCHANGE", "pigeon")
    with pytest.raises(ValueError, match="SYNCBN_EXCHANGE='pigeon' is not allowed: one of auto,"):
        rendezvous.connect(Alone(), HEADER, 1)


def _gather(group):
    own = torch.full((3,), float(dist.get_rank()))
    gathered = exchange_of(group).gather(own, FORWARD, Fingerprint("bn", 3, own.dtype, True))
    assert gathered[:, 0].tolist() == list(range(dist.get_world_size()))


@contextmanager
def _no_descriptors_left():
    """Every descriptor of this process is in use inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    held = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.world_size(2, 3)
def test_a_rank_out_of_descriptors_has_all_ranks_exchange_by_another_transport(world_size):
    group = dist.new_group()
    dist.barrier(group)  # its connections exist
    library()  # is loaded
    if dist.get_rank() == 1:
        with _no_descriptors_left():
            _gather(group)
            assert processes.Process.own().state() == ""
    else:
        _gather(group)
    assert type(exchange_of(group).transport) is Group
    _gather(group)


@pytest.mark.world_size(2)
def test_a_rank_out_of_descriptors_waits_for_a_late_one_and_calls_none_dead(world_size):
    group = dist.new_group()
    _gather(group)
    dist.barrier()
    if dist.get_rank() == 1:
        with _no_descriptors_left():
            _gather(group)
    else:
        time.sleep(2)
        _gather(group)
