"""Ranks that do not come to an exchange, by every transport: which are waited for, which are named, and by whom."""

import atexit
import copy
import logging
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from ranks import TIMEOUT_S
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.norm.comm import watchdog
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of
from syncbn.norm.comm.fingerprint import RankLost
from syncbn.norm.comm.transports import process_group, sockets
from syncbn.norm.native import library

WAYS = ["gloo", "sockets"] + ["shared"] * (library() is not None)
HERE = r"rank {} is in the forward of SyncBatchNorm 'bn' .sequence number \d, 3 channels, float32. "
LOOK_S = 0.15
"""How often is looked: a process that is given no processor for three times as long seems to be blocked."""
SLOW_S = 10 * LOOK_S


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@contextmanager
def _quick(way, slow_s=1e9):
    """Watchdogs, and ranks that wait, that look every `LOOK_S`, and groups that use one transport."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SYNCBN_EXCHANGE", way)
        monkeypatch.setattr(watchdog, "TICK_S", LOOK_S)
        monkeypatch.setattr(watchdog, "ASK_S", LOOK_S)
        monkeypatch.setattr(watchdog, "SLOW_S", slow_s)
        monkeypatch.setattr(process_group, "_LOOK", timedelta(seconds=LOOK_S))
        monkeypatch.setattr(sockets, "_LOOK_S", LOOK_S)
        watchdog.watch()  # as a rank does that builds a layer
        yield


def _gather(group, layer="bn"):
    """One exchange, which must bring what every rank sent."""
    own = torch.full((3,), float(dist.get_rank(group)))
    gathered = exchange_of(group).gather(own, FORWARD, Fingerprint(layer, 3, own.dtype, True))
    ranks = torch.arange(dist.get_world_size(group), dtype=torch.float32)
    assert torch.equal(gathered, ranks[:, None].expand(-1, 3))


def _group(first, ranks=None):
    """A group, perhaps after its first exchange."""
    group = dist.new_group(ranks)
    if not first and dist.get_rank() in (ranks or range(dist.get_world_size())):
        _gather(group)
    return group


def _refused(group, match, error=(syncbn.RanksDisagree, RankLost)):
    with pytest.raises(error, match=match):
        _gather(group)


def _store():
    return dist.distributed_c10d._get_default_store()


# waited for


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.slow_if(lambda world_size, way, **_: world_size == 3 and way != "shared")
def test_a_rank_in_eval_mode_is_waited_for_its_backward_passes_included(world_size, way, first):
    with _quick(way):
        group, rank = _group(first), dist.get_rank()
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        if rank == 0:
            layer.eval()
            for x in (torch.randn(4, 3, requires_grad=True) for _ in range(5)):
                layer(x)
                torch.autograd.grad(layer(x).sum(), x)
            time.sleep(SLOW_S)
            layer.train()
        layer(torch.randn(4, 3, requires_grad=True)).square().sum().backward()


@pytest.mark.world_size(2)
def test_a_rank_that_is_slow_is_waited_for_and_mentioned(world_size, way):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: _note(said, record, f"mentioned {way}")
    watchdog.log.addHandler(handler)
    with _quick(way, slow_s=SLOW_S):
        group, rank = _group(first=False), dist.get_rank()
        if rank == 1:
            _store().wait([f"mentioned {way}"])
        _gather(group)
    watchdog.log.removeHandler(handler)
    assert [text.startswith("rank 0 is in the forward") for text in said] == [True] * (rank == 0)
    assert all("slow rank 1" in text for text in said)


def _note(said, record, key):
    said.append(record.getMessage())
    _store().set(key, "")


@pytest.mark.world_size(3)
def test_a_rank_that_waits_elsewhere_for_a_slow_third_is_waited_for(world_size, way):
    with _quick(way):
        rank = dist.get_rank()
        pairs = [_group(first=False, ranks=ranks) for ranks in ([0, 1], [1, 2])]
        if rank == 2:
            time.sleep(SLOW_S)
        for group in reversed(pairs):
            if isinstance(group, dist.ProcessGroup):
                dist.barrier(group) if group is pairs[1] else _gather(group)


@pytest.mark.world_size(3)
def test_a_rank_that_collects_from_a_slow_third_is_waited_for_by_those_that_have_sent(
    world_size, way
):
    with _quick(way):
        group, rank = _group(first=False), dist.get_rank()
        if rank == 2:
            time.sleep(SLOW_S)
        parts = [torch.zeros(1) for _ in range(3)] if rank == 1 else None
        dist.gather(torch.ones(1), parts, dst=1)
        _gather(group)


# named


def _ddp():
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Linear(3, 3))


def _reduced():
    return functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD)


ELSEWHERE = {
    "barrier": (lambda _: dist.barrier(), "barrier of torch.distributed"),
    "all_reduce": (lambda _: dist.all_reduce(torch.ones(3)), "all_reduce of torch.distributed"),
    "started": (lambda _: dist.all_reduce(torch.ones(3), async_op=True).wait(), "a collective"),
    "broadcast": (lambda _: dist.broadcast(torch.ones(3), 0), "broadcast of torch.distributed"),
    "functional": (lambda _: _reduced().sum().item(), "unwrap of torch.distributed"),
    "backward": (lambda model: model(torch.ones(2, 3)).sum().backward(), "a backward pass"),
}


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.slow_if(
    lambda world_size, way, first: world_size == 3 and (way != "shared" or not first)
)
def test_a_rank_blocked_in_another_collective_is_named_by_all_that_wait(world_size, way, first):
    with _quick(way):
        model = _ddp()
        for _, (enter, _) in [*ELSEWHERE.items()] * 2:  # their first use does more than the others
            enter(model)
        for enter, name in ELSEWHERE.values():
            group = _group(first)
            dist.barrier()
            if dist.get_rank() != 1:
                waits = f".*and waits for rank 1: it is blocked in {name}.* at test_watchdog_ranks"
                _refused(group, HERE.format("[02]") + waits)
                _refused(group, "waits for rank 1: it is blocked in")
                _all_others_have_given_up(name)
            enter(model)  # lets the other rank out
            if dist.get_rank() == 1:
                _ends(group)
            dist.barrier()


def _in_vain(waits, may_end):
    """A store whose server ended: a connection to it is tried for some 300 s."""
    waits.set()
    may_end.wait(TIMEOUT_S)


@pytest.mark.world_size(2)
def test_a_rank_is_named_in_a_group_made_anew_while_its_watchdog_waits_for_the_old_store(
    world_size, way
):
    waits, may_end = threading.Event(), threading.Event()
    store, rank = _store(), dist.get_rank()
    with _quick(way):
        old = watchdog.watch()
        old._reached, old._store = lambda: _in_vain(waits, may_end), None
        assert waits.wait(TIMEOUT_S)
        dist.barrier()
        dist.destroy_process_group()
        anew = dist.PrefixStore(f"anew {way}", store)
        dist.init_process_group("gloo", store=anew, rank=rank, world_size=world_size)
        group = _group(first=False)
        if rank == 0:
            _refused(group, "waits for rank 1: it is blocked in barrier")
        dist.barrier()
        if rank == 1:
            _ends(group)
    may_end.set()


def _all_others_have_given_up(name):
    """Wait for the ranks that are refused: one that still waits would take what rank 1 completes for an answer."""
    _store().add(f"given up {name}", 1)
    while _store().add(f"given up {name}", 0) < dist.get_world_size() - 1:
        time.sleep(0.01)


def _ends(group):
    """Complete what others have given up: a group of gloo's that is under way cannot be destroyed."""
    with suppress(syncbn.RanksDisagree, RankLost):
        _gather(group)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_ranks_in_layers_of_different_groups_name_each_other(world_size, way, first):
    with _quick(way):
        groups, rank = [_group(first), _group(first)], dist.get_rank()
        # the second to find out may see the first in the barrier
        other = f"and waits for rank {1 - rank}: it is (in the forward of Sync|blocked in barrier)"
        _refused(groups[rank], HERE.format(rank) + other)
        dist.barrier()
        _ends(groups[1 - rank])
        dist.barrier()


@pytest.mark.world_size(3)
def test_ranks_that_wait_for_each_other_in_a_circle_of_groups_are_named(world_size):
    with _quick(WAYS[-1]):
        rank = dist.get_rank()
        groups = [_group(first=False, ranks=sorted([one, (one + 1) % 3])) for one in range(3)]
        _refused(groups[rank], f"waits for rank {(rank + 1) % 3}: it is (in the f|blocked in b)")
        dist.barrier()


@pytest.mark.world_size(3)
def test_a_rank_that_does_not_come_is_named_at_the_time_limit(world_size, way):
    with _quick(way):
        group, rank = _group(first=False), dist.get_rank()
        if rank == 1:
            # else the other may see this rank hang up before its own limit
            _store().wait([f"{rank} gave up {way}" for rank in (0, 2)])
            _ends(group)
        else:
            exchange_of(group)._group.timeout_s = 2.0
            _refused(
                group, HERE.format("[02]") + "and waits for rank 1: it did not come within 2 s"
            )
            _store().set(f"{rank} gave up {way}", "")
            _refused(group, "waits for rank 1: it did not come within 2 s")
        dist.barrier()


@pytest.mark.world_size(2)
@pytest.mark.untraced  # like the next one it hung once under coverage, with the ranks of a whole run
@pytest.mark.skipif("shared" not in WAYS, reason="the native library is not built")
def test_a_rank_that_destroyed_its_group_is_named(world_size):
    with _quick("shared"):
        group, rank = _group(first=False), dist.get_rank()
        dist.barrier()
        if rank:
            dist.destroy_process_group(group)
            del group
        else:
            _refused(group, "waits for rank 1: it destroyed its process group and cannot come")
        dist.barrier()


@pytest.mark.world_size(2)
@pytest.mark.untraced  # a child may inherit coverage's lock, held by the watchdog's thread, and never get it
@pytest.mark.skipif("shared" not in WAYS, reason="the native library is not built")
def test_a_forked_child_that_ends_does_not_speak_for_its_parent(world_size):
    with _quick("shared"):
        group, rank = _group(first=False), dist.get_rank()
        if rank:
            child = os.fork()
            if child == 0:
                watchdog.watch()
                atexit._run_exitfuncs()
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(SLOW_S)
        _gather(group)


@pytest.mark.world_size(2)
@pytest.mark.untraced  # as above
def test_a_forked_child_that_trains_is_refused_and_its_parent_goes_on(world_size, way):
    with _quick(way):
        group = _group(first=False)
        if dist.get_rank():
            child = os.fork()
            if child == 0:
                layer = syncbn.SyncBatchNorm(3, process_group=group)
                layer.eval()(torch.randn(4, 3))
                try:
                    layer.train()(torch.randn(4, 3))
                except RuntimeError as error:
                    os._exit(7 if "forked from a rank" in str(error) else 1)
                os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        _gather(group)


@pytest.mark.world_size(2)
def test_a_thread_that_copies_and_converts_models_and_saves_is_not_taken_for_the_one_that_trains(
    world_size, way
):
    with _quick(way):
        group, rank, saves = _group(first=False), dist.get_rank(), dist.new_group()
        model = syncbn.SyncBatchNorm(3, process_group=group)
        copied = threading.Event()

        def save():
            copy.deepcopy(model)
            syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3))
            copied.set()
            if rank == 1:
                dist.barrier(saves)

        thread = threading.Thread(target=save)
        thread.start()
        assert copied.wait(TIMEOUT_S)
        if rank == 1:
            time.sleep(SLOW_S)  # longer than it takes to find a rank blocked
        _gather(group)
        if rank == 0:
            dist.barrier(saves)
        thread.join()


@pytest.mark.world_size(2)
def test_a_rank_that_trains_in_another_thread_than_before_is_named_by_what_it_does_there(
    world_size, way
):
    with _quick(way):
        group, rank = _group(first=False), dist.get_rank()
        thread = threading.Thread(target=_blocked if rank else _gather, args=(group,))
        thread.start()
        if rank == 0:
            thread.join()
            _refused(group, "waits for rank 1: it is blocked in barrier")
            dist.barrier()
        thread.join()
        if rank == 1:
            _ends(group)
        dist.barrier()


def _blocked(group):
    _gather(group)
    dist.barrier()


@pytest.mark.world_size(2, 3)
@pytest.mark.slow_if(lambda world_size, way, **_: world_size == 3 and way != "shared")
def test_a_rank_that_is_interrupted_while_it_waits_tells_the_others(world_size, way):
    with _quick(way):
        group, rank = _group(first=False), dist.get_rank()
        if rank == 0:
            before = signal.signal(signal.SIGALRM, _interrupt)
            with pytest.raises(KeyboardInterrupt, match="enough"):
                _gather_interrupted(group)
            signal.signal(signal.SIGALRM, before)
        elif rank == 2:
            _refused(group, "rank 0|enough")
        told = [f"told {way} {other}" for other in range(world_size) if other != 1]
        _store().wait(told) if rank == 1 else _store().set(f"told {way} {rank}", "")
        if rank == 1 and way == "gloo":  # the values of the ranks that gave up had been sent
            _gather(group)
        else:
            _refused(group, "rank 0|enough")


def _gather_interrupted(group):
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    _gather(group)


def _interrupt(*_):
    raise KeyboardInterrupt("enough")
