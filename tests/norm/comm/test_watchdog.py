"""The watchdog without ranks: what it sees of threads and processes, what follows from that, and what it says."""

import dis
import logging
import os
import subprocess
import threading
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from syncbn.norm.comm import processes, watchdog
from syncbn.norm.comm.fingerprint import (
    FORWARD,
    NAMED,
    Fingerprint,
    RankLost,
    RanksDisagree,
    packed,
    text_of,
)
from syncbn.norm.comm.processes import Collective, Process, activity
from syncbn.norm.comm.watchdog import Post, Wait, _Watchdog, held_up

HEADER = packed(FORWARD, NAMED, 32, Fingerprint("bn", 3, torch.float32, True))
HERE = "rank 0 is in the forward of SyncBatchNorm 'bn' .sequence number 7, 3 channels, float32. "
ELSEWHERE = Process(1, 0, "another machine")


class Clock:
    """A time that only a test moves."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(watchdog.time, "sleep", self.move)

    def move(self, seconds):
        self.now_s += seconds


def _wait(num_ranks=2, timeout_s=60.0, processes=()):
    """Rank 0 of a group waits in its exchange number 7; its thread is not started."""
    group = SimpleNamespace(
        name="g",
        rank=0,
        ranks=list(range(num_ranks)),
        timeout_s=timeout_s,
        processes=processes,
        turn=(HEADER, 7),
        here=lambda: f"rank 0 {text_of(HEADER, 7)}",
    )
    return Wait(group)


def _post(quiet=0, collective=None, episode=0, text="is somewhere", tick=0, **options):
    fields = {"process": ELSEWHERE, "failures": {}} | options
    return Post(tick, episode, quiet, text, collective, **fields)


def _study(wait, *rounds):
    for posts in rounds:
        wait.study(posts.get)


# what follows from what ranks do


ALL = Collective("barrier", [0, 1, 2], symmetric=True)
EXCHANGE = Collective("exchange", [0, 1, 2], symmetric=True)


@pytest.mark.parametrize(
    ("blocked", "held"),
    [
        ({0: EXCHANGE}, set()),
        ({0: EXCHANGE, 1: EXCHANGE}, set()),
        ({0: EXCHANGE, 1: EXCHANGE, 2: EXCHANGE}, set()),
        ({0: EXCHANGE, 1: ALL}, {0, 1}),
        ({0: EXCHANGE, 1: ALL, 2: ALL}, {0, 1, 2}),
        # rank 1 waits for rank 2, which may come at any time
        ({0: Collective("a", [0, 1], True), 1: Collective("b", [1, 2], True)}, set()),
        # each in a layer of another group, in a circle
        (
            {
                0: Collective("a", [0, 1], True),
                1: Collective("b", [1, 2], True),
                2: Collective("c", [2, 0], True),
            },
            {0, 1, 2},
        ),
        # rank 1 gathers from 0, which has sent its part, and from 2, which is slow
        ({0: EXCHANGE, 1: Collective("gather", [0, 1, 2], symmetric=False)}, set()),
        (
            {0: EXCHANGE, 1: Collective("gather", [0, 1, 2], symmetric=False), 2: EXCHANGE},
            {0, 1, 2},
        ),
        # an operation that all its ranks have entered goes on
        ({0: EXCHANGE, 1: Collective("b", [1, 2], True), 2: Collective("b", [1, 2], True)}, set()),
    ],
)
def test_a_rank_is_held_up_only_by_ranks_that_are_held_up(blocked, held):
    assert held_up(blocked) == held


_collectives = st.builds(
    Collective,
    st.sampled_from("abc"),
    st.lists(st.integers(0, 4), min_size=2, unique=True),
    st.booleans(),
)


@given(st.dictionaries(st.integers(0, 4), _collectives))
def test_a_rank_that_waits_for_ranks_that_run_alone_is_not_held_up(blocked):
    for rank in held_up(blocked):
        own = blocked[rank]
        inside = {other for other, one in blocked.items() if one.name == own.name}
        assert (set(own.ranks) - inside - {rank}) & held_up(blocked)


# what a wait says


def test_a_rank_blocked_in_another_collective_is_named_once_it_was_seen_there_during_the_wait():
    wait = _wait()
    barrier = Collective("barrier", [0, 1], symmetric=True)
    text = "is blocked in barrier of torch.distributed, at train.py:3 in main"
    _study(wait, {1: _post(quiet=9, collective=barrier, text=text)})
    wait.look()
    _study(wait, {1: _post(quiet=10, collective=barrier, text=text)})
    with pytest.raises(RanksDisagree, match=HERE + f"and waits for rank 1: it {text} and cannot"):
        wait.look()


@pytest.mark.parametrize(
    "second",
    [
        _post(quiet=9, collective=ALL),
        _post(quiet=2, collective=ALL),
        _post(quiet=10, collective=ALL, episode=1),
        _post(quiet=10),
    ],
    ids=["not seen again", "too short", "another place", "not in a collective"],
)
def test_a_rank_that_may_have_moved_on_is_not_named(second):
    wait = _wait(3)
    _study(wait, {1: _post(quiet=9 if second.quiet > 2 else 1, collective=ALL)}, {1: second})
    wait.look()


def test_ranks_in_the_same_exchange_wait_together_for_the_third():
    wait = _wait(3)
    same = [_post(quiet=n, collective=wait.activity.collective) for n in (8, 9)]
    _study(wait, {1: same[0]}, {1: same[1]})
    wait.look()
    assert wait._late() == [2]


def test_ranks_outside_the_group_are_asked_too():
    wait = _wait(2)
    other, back = Collective("b", [1, 2], True), Collective("c", [2, 0], True)
    posts = [{1: _post(n, other, text="is in b"), 2: _post(n, back)} for n in (8, 9)]
    _study(wait, *posts)
    with pytest.raises(RanksDisagree, match="waits for rank 1: it is in b and cannot come"):
        wait.look()


@pytest.mark.parametrize(("lost", "error"), [(True, RankLost), (False, RanksDisagree)])
def test_what_made_another_rank_give_up_is_raised_here_too(lost, error):
    wait = _wait()
    _study(wait, {1: _post(failures={"other": (True, "no"), "g": (lost, "rank 1 gave up")})})
    with pytest.raises(error, match=r"^rank 1 gave up$"):
        wait.look()


def test_a_slow_rank_is_mentioned_once_with_what_it_was_last_seen_doing(monkeypatch, caplog):
    clock, wait = Clock(monkeypatch), _wait()
    _study(wait, {1: _post(text="was last seen at train.py:9 in upload")})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            wait.look()
            clock.move(8.0)
    (message,) = caplog.messages
    assert message.endswith(
        "and has waited 16 s for slow rank 1 (it was last seen at train.py:9 in upload)"
    )


@pytest.mark.parametrize(
    ("posts", "said"),
    [
        ({}, "rank 1: it did not come within 60 s;"),
        ({1: _post(collective=Collective("exchange 7 of group g", [0, 1, 2], True))}, "rank 2: it"),
    ],
)
def test_a_rank_that_does_not_come_is_named_at_the_time_limit(monkeypatch, posts, said):
    clock, wait = Clock(monkeypatch), _wait(3)
    _study(wait, posts)
    clock.move(60.5)
    with pytest.raises(RanksDisagree, match=f"waits for {said}"):
        wait.look()


def test_a_rank_elsewhere_that_has_fallen_silent_is_lost_at_the_time_limit(monkeypatch):
    clock, wait = Clock(monkeypatch), _wait(3)
    _study(wait, {1: _post(text="runs")})
    clock.move(60.5)
    with pytest.raises(RankLost, match=r"rank 1: it did not come within 60 s \(it runs\)$"):
        wait.look()


@contextmanager
def _child(*command):
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_stopped_rank_is_waited_for_and_said_to_be_stopped(monkeypatch):
    with _child("sleep", "60") as child:
        os.kill(child.pid, 19)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        stopped = Process(child.pid, 0, processes.machine())
        clock, wait = Clock(monkeypatch), _wait(processes=[Process.own(), stopped])
        wait.look([1])
        clock.move(61.0)
        with pytest.raises(RankLost, match=r"come within 60 s \(it is stopped\)"):
            wait.look([1])


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
@pytest.mark.parametrize("known", ["from the start", "from its post"])
def test_a_rank_that_exited_is_lost_reaped_or_not(reaped, known):
    with _child("true") as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            child.wait()
        gone = Process(child.pid, 0, processes.machine())
        wait = _wait(processes=[Process.own(), gone] if known == "from the start" else [])
        _study(wait, {1: _post(process=gone)})
        with pytest.raises(RankLost, match=HERE + "and waits for rank 1: it exited"):
            wait.look()


def test_of_ranks_that_exited_the_one_is_named_that_had_not_come():
    with _child("true") as child:
        child.wait()
        gone = Process(child.pid, 0, processes.machine())
        wait = _wait(3)
        _study(wait, {1: _post(collective=wait.activity.collective, process=gone)})
        wait._group.processes = [Process.own(), gone, gone]
        with pytest.raises(RankLost, match="waits for rank 2: it exited"):
            wait.look()


def test_all_ranks_that_exited_are_named_where_none_is_known_to_have_come():
    with _child("true") as child:
        child.wait()
        gone = Process(child.pid, 0, processes.machine())
        wait = _wait(3)
        wait._group.processes = [Process.own(), gone, gone]
        with pytest.raises(RankLost, match="waits for rank 1 and rank 2: they exited"):
            wait.look()


def test_a_rank_that_has_come_and_given_up_is_heard_too():
    wait = _wait(3)
    wait.look([2])
    _study(wait, {1: _post(failures={"g": (True, "rank 1 was interrupted")})})
    with pytest.raises(RankLost, match="rank 1 was interrupted"):
        wait.look([2])


def test_a_rank_that_left_the_group_cannot_come():
    with pytest.raises(RanksDisagree, match="it destroyed its process group and cannot come"):
        _wait().look([1], left=[1])


@pytest.mark.parametrize(("answered", "who"), [(None, "rank 1 or 2"), (1, "rank 2"), (2, "rank 1")])
def test_of_a_broken_connection_the_ranks_are_named_that_answer_nothing(monkeypatch, answered, who):
    Clock(monkeypatch)
    wait = _wait(3)
    for tick in (1, 2):
        _study(wait, {} if answered is None else {answered: _post(tick=tick)})
    error = wait.lost("Connection closed by peer")
    assert isinstance(error, RankLost)
    assert f"waits for {who}: it exited, failed or left the group (Connection closed" in str(error)


def test_a_broken_connection_is_explained_by_a_rank_that_says_why_it_gave_up(monkeypatch):
    Clock(monkeypatch)
    wait = _wait(3)
    _study(wait, {2: _post(failures={"g": (False, "rank 2 gave up")})})
    assert str(wait.lost("Connection closed by peer")) == "rank 2 gave up"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RankLost("rank 1 exited"), (True, "rank 1 exited")),
        (RanksDisagree("rank 1 is elsewhere"), (False, "rank 1 is elsewhere")),
        (KeyboardInterrupt(), (True, "and was interrupted: KeyboardInterrupt()")),
    ],
)
def test_a_rank_that_gives_up_tells_the_others(monkeypatch, error, told):
    own = _Watchdog()
    monkeypatch.setattr(own, "start", lambda _: None)
    monkeypatch.setattr(watchdog, "_watchdog", own)
    wait = _wait()
    monkeypatch.setattr(wait, "look", Mock(side_effect=error))
    with pytest.raises(type(error)), wait:
        wait.look()
    lost, message = own._failures["g"]
    assert (lost, message[-len(told[1]) :]) == told
    assert not own.waits


# what it sees of threads and processes


@pytest.fixture
def world(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def _frame(function, module, **variables):
    """A frame as of `function` in `module`, with these variables."""
    code = (lambda: 1).__code__.replace(co_name=function, co_filename=f"/x/{module}.py")
    return SimpleNamespace(
        f_code=code,
        f_globals={"__name__": module},
        f_locals=variables,
        f_back=None,
        f_lineno=12,
        f_lasti=2,
    )


def _stack(*frames):
    for inner, outer in pairwise(frames):
        inner.f_back = outer
    return frames[0]


USER = ("main", "train")


def test_a_collective_is_known_by_its_function_and_its_group(world):
    c10d = "torch.distributed.distributed_c10d"
    frame = _stack(
        _frame("all_gather", c10d, group=world),
        _frame("wrapper", "torch.distributed.c10d_logger"),
        _frame("all_gather_object", c10d, group=None),
        _frame("wrapper", "torch.distributed.c10d_logger"),
        _frame(*USER),
    )
    seen = activity(frame)
    assert seen.text == (
        "is blocked in all_gather_object of torch.distributed, at train.py:12 in main"
    )
    assert seen.collective == Collective(
        f"all_gather_object of group {world.group_name}", [0], True
    )


@pytest.mark.parametrize(
    ("function", "symmetric"),
    [("barrier", True), ("_all_gather_base", True), ("broadcast", False), ("recv", False)],
)
def test_a_rank_may_leave_some_collectives_before_others_have_entered(world, function, symmetric):
    frame = _frame(function, "torch.distributed.distributed_c10d")
    assert activity(_stack(frame, _frame(*USER))).collective.symmetric is symmetric


def test_the_broadcast_of_a_wrapped_model_is_a_collective_of_its_group(world):
    model = SimpleNamespace(process_group=world)
    frame = _frame("_sync_buffers", "torch.nn.parallel.distributed", self=model)
    assert activity(_stack(frame, _frame(*USER))).collective.ranks == [0]


@pytest.mark.parametrize("num_models", [0, 1])
def test_a_backward_pass_waits_for_the_group_of_the_model_that_is_wrapped(world, num_models):
    models = [
        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1)) for _ in range(num_models)
    ]
    seen = activity(_stack(_frame("_engine_run_backward", "torch.autograd.graph"), _frame(*USER)))
    assert seen.text.startswith("is blocked in a backward pass")
    assert seen.collective.symmetric is bool(models)


def test_a_thread_without_a_frame_of_the_users_is_described_by_its_innermost():
    assert (
        activity(_frame("forward", "torch.nn")).text == "was last seen at torch.nn.py:12 in forward"
    )


def _waits_for_a_variable(work):
    work.wait()


def _waits_for_what_it_starts(_):
    dist.all_reduce(torch.ones(1), async_op=True).wait()


def _waits_for_something_else(event):
    event.wait()


@pytest.mark.parametrize(
    ("function", "is_collective"),
    [
        (_waits_for_a_variable, True),
        (_waits_for_what_it_starts, True),
        (_waits_for_something_else, False),
        (_stack, False),
    ],
)
def test_waiting_for_a_collective_that_was_started_is_told_from_other_waits(
    world, monkeypatch, function, is_collective
):
    monkeypatch.setattr(dist, "Work", str)
    calls = [one.offset for one in dis.get_instructions(function) if one.opname == "CALL"]
    frame = _frame(*USER, work="work", event=threading.Event())
    frame.f_code, frame.f_lasti = function.__code__, calls[-1]
    seen = activity(frame).collective
    assert seen == (Collective("work", [0], symmetric=False) if is_collective else None)
