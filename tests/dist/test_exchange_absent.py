"""A rank that does not come to an exchange in shared memory: what the others learn, and how soon."""

import atexit
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.norm.comm import patrol
from syncbn.norm.comm.transports import shared_memory as shared
from syncbn.norm.comm.exchange import RankLost, exchange_of

pytestmark = pytest.mark.skipif(
    shared._native() is None, reason="the native library is not built: there is no shared memory"
)

RANK = "rank {} is in the forward of SyncBatchNorm 'bn1' .call 2"


def _group(timeout_s=30.0):
    """A group after its first exchange; connecting its ranks may take longer than they then wait."""
    group = dist.new_group(list(range(dist.get_world_size())))
    _gather(group, "bn1")
    exchange_of(group)._transport._timeout_s = timeout_s
    return group


def _gather(group, layer, kind=1):
    """One exchange, which must bring what every rank sent."""
    own = torch.full((3,), float(dist.get_rank(group)))
    came = exchange_of(group).gather(
        own, kind=kind, layer=layer, channels=1, dtype=torch.float32, needs_grad=True
    )
    ranks = torch.arange(dist.get_world_size(group), dtype=torch.float32)
    assert torch.equal(came, ranks[:, None].expand(-1, 3))


def _passes(group, *layers, backward):
    for layer in layers:
        exchange_of(group).pass_by(layer, backward)


def _seconds_until_refused(group, match, error=syncbn.RanksDisagree):
    began = time.monotonic()
    with pytest.raises(error, match=match):
        _gather(group, "bn1")
    return time.monotonic() - began


def _asleep_after(monkeypatch, forward=60.0, backward=60.0, unknown=60.0):
    limits = {"forward": forward, "backward": backward, "": unknown}
    monkeypatch.setattr(patrol, "ASLEEP_S", limits)


def _work(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


@pytest.mark.world_size(2, 3)
def test_after_the_time_limit_nobody_can_use_the_exchange_any_more(world_size):
    group, rank = _group(timeout_s=1.0), dist.get_rank()
    match = RANK.format("[02]") + r".*waits for rank 1: it did not come within 1 s"
    if rank != 1:
        assert 0.9 < _seconds_until_refused(group, match) < 3
    dist.barrier()
    assert _seconds_until_refused(group, match) < 0.5


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("backward", "limits"), [(True, {"backward": 1.5}), (False, {"forward": 1.5})]
)
def test_a_rank_that_sleeps_after_a_pass_in_eval_mode_is_named(world_size, backward, limits):
    group, rank = _group(), dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _asleep_after(monkeypatch, **limits)
        _passes(group, "bn1", "bn2", backward=False) if rank else None
        _passes(group, "bn2", "bn1", backward=True) if rank and backward else None
        dist.barrier()
        word = "backward" if backward else "forward"
        match = RANK.format(0) + f".*rank 1: it went through the {word} of this layer in eval mode"
        if rank == 0:
            assert 1.5 <= _seconds_until_refused(group, match) < 4
        else:
            time.sleep(4)
            assert _seconds_until_refused(group, match) < 0.5


@pytest.mark.world_size(2)
@pytest.mark.parametrize("both", [True, False], ids=["both", "another layer"])
def test_passes_that_explain_nothing_do_not_shorten_the_wait(world_size, both):
    """Either both ranks went through the layer in eval mode, or the one that is late through another layer."""
    group, rank = _group(), dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _asleep_after(monkeypatch, forward=0.7, backward=0.7)
        for backward in (False, True):
            _passes(group, "bn1" if both else "bn2", backward=backward)
        time.sleep(2 * rank)
        _gather(group, "bn1")


@pytest.mark.world_size(2)
def test_passes_are_forgotten_after_the_next_exchange(world_size):
    group, rank = _group(), dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _asleep_after(monkeypatch, forward=0.7)
        if rank:
            _passes(group, "bn1", backward=False)
        _gather(group, "bn1")
        time.sleep(2 * rank)
        _gather(group, "bn1")


@pytest.mark.world_size(2)
def test_a_rank_that_sleeps_for_no_known_reason_is_waited_for_longer(world_size):
    group, rank = _group(), dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _asleep_after(monkeypatch, forward=0.7, backward=0.7, unknown=3.0)
        time.sleep(2 * rank)
        _gather(group, "bn1")
        if rank == 0:
            assert 3.0 <= _seconds_until_refused(group, "been blocked elsewhere for 3 s") < 5
        else:
            time.sleep(5)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("where", ["in the process", "in a child"])
def test_a_rank_that_works_is_waited_for_and_mentioned(world_size, where):
    group, rank = _group(), dist.get_rank()
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    patrol.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _asleep_after(monkeypatch, forward=1.0, unknown=1.5)
        monkeypatch.setattr(patrol, "SLOW_S", 0.5)
        if rank:
            _passes(group, "bn1", backward=False)
            _work(3) if where == "in the process" else _work_in_a_child(3)
        _gather(group, "bn1")
    patrol.log.removeHandler(handler)
    assert [text.endswith("slow rank 1") for text in said] == [True] * (rank == 0)


def _work_in_a_child(seconds):
    program = f"import time; t = time.monotonic()\nwhile time.monotonic() < t + {seconds}: pass"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.world_size(2, 3)
def test_backward_in_eval_mode_while_others_wait_in_training_fails_at_once_on_all(world_size):
    group, rank = _group(), dist.get_rank()
    match = "rank 1 runs the backward pass of SyncBatchNorm 'bn2' in eval mode; rank [02] is in the"
    if rank == 1:
        _passes(group, "bn1", "bn2", backward=False)
        time.sleep(0.5)
        with pytest.raises(syncbn.RanksDisagree, match=match):
            _passes(group, "bn2", backward=True)
    else:
        assert _seconds_until_refused(group, match) < 5


@pytest.mark.world_size(2)
@pytest.mark.parametrize("frozen", ["bn1", "bn2"])
def test_layers_frozen_on_all_ranks_are_no_disagreement_when_one_rank_is_faster(world_size, frozen):
    """The faster rank waits in the next step while the slower one runs backward through the frozen layer."""
    group, rank = _group(), dist.get_rank()
    trained = {"bn1": "bn2", "bn2": "bn1"}[frozen]
    for _ in range(3):
        _passes(group, frozen, backward=False)
        _gather(group, trained)
        _gather(group, trained, kind=2)
        time.sleep(0.3 * rank)
        _passes(group, frozen, backward=True)


@pytest.mark.world_size(2)
def test_saliency_maps_on_all_ranks_are_no_disagreement(world_size):
    group, rank = _group(), dist.get_rank()
    _passes(group, "bn1", backward=False)
    time.sleep(0.3 * rank)
    _passes(group, "bn1", backward=True)
    _gather(group, "bn1")


@pytest.mark.world_size(2)
def test_a_rank_that_destroyed_its_group_is_named_at_once(world_size):
    group, rank = _group(), dist.get_rank()
    dist.barrier()
    if rank:
        dist.destroy_process_group(group)
        del group
        time.sleep(1)
    else:
        assert _seconds_until_refused(group, "rank 1: it destroyed its process group") < 2


@pytest.mark.world_size(2)
def test_a_forked_child_that_ends_does_not_speak_for_its_parent(world_size):
    group, rank = _group(), dist.get_rank()
    if rank:
        child = os.fork()
        if child == 0:
            atexit._run_exitfuncs()
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.5)
    _gather(group, "bn1")


@pytest.mark.world_size(2)
def test_a_rank_that_is_interrupted_while_it_waits_tells_the_others(world_size):
    group, rank = _group(), dist.get_rank()
    if rank == 0:
        before = signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert _seconds_until_refused(group, "enough", KeyboardInterrupt) < 2
        signal.signal(signal.SIGALRM, before)
    else:
        time.sleep(1)
    assert _seconds_until_refused(group, "rank 0 is in .* was interrupted there", RankLost) < 0.5


def _interrupt(*_):
    raise KeyboardInterrupt("enough")
