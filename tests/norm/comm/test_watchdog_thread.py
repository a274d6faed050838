"""The watchdog's thread: when it looks, what it posts, by which store, and when it ends."""

import json
import logging
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from test_watchdog import USER, Clock, _frame, _wait, world

from syncbn.norm.comm import processes, watchdog
from syncbn.norm.comm.processes import Activity, activity
from syncbn.norm.comm.watchdog import _Watchdog

__all__ = ["world"]  # a fixture


class Two(_Watchdog):
    """The watchdog of one of two ranks, whose looks a test takes, and which share a store."""

    def __init__(self, rank, store):
        super().__init__()
        self._store, self._rank, self._model = store, rank, processes.Thread()
        self.wake, self.used = lambda: None, 0.0

    def _reach(self):
        return self._store

    def start(self, runs):
        pass


@pytest.fixture
def two(monkeypatch):
    store = dist.HashStore()
    first, second = Two(0, store), Two(1, store)
    monkeypatch.setattr(watchdog, "_watchdog", first)
    return first, second


def test_nothing_is_posted_while_no_rank_waits(two):
    for _ in range(3):
        for one in two:
            one.look()
    assert not two[0]._store.check(["syncbn/post/0"])


def test_a_rank_that_waits_asks_and_learns_what_the_other_does(two, monkeypatch):
    clock = Clock(monkeypatch)
    first, second = two
    with _wait() as wait:
        for _ in range(2):
            first.look()
            second.look()
        assert not wait._posts  # it has not waited long enough to ask
        for _ in range(3):
            clock.move(1.0)
            wait.look()
            first.look()
            second.look()
        assert wait.answers(1)
        assert wait._posts[1].text.startswith("was last seen at")
        assert watchdog._read(first._store, 0).collective == wait.activity.collective
        assert watchdog._read(first._store, 0).quiet > 0
    clock.move(60.0)
    assert not wait.answers(1)


def test_a_wait_that_is_not_looked_at_again_does_not_count_as_seen(two, monkeypatch):
    clock = Clock(monkeypatch)
    first, _ = two
    with _wait() as wait:
        wait.look()
        for _ in range(5):
            clock.move(1.0)
            first.look()
        assert watchdog._read(first._store, 0).quiet <= 1


def test_a_thread_is_seen_again_at_one_place_only_while_it_sleeps_and_uses_no_time(two):
    _, second = two
    states = [(0.0, True), (0.0, True), (0.0, False), (0.0, True), (0.5, True), (0.5, True)]
    quiet = []
    frame = _frame(*USER)
    for used_s, sleeps in states:
        second._model = SimpleNamespace(
            frame=lambda: frame, used_s=lambda at=used_s: at, sleeps=lambda at=sleeps: at
        )
        second._observe(wanted=False)
        quiet.append(second._quiet)
    assert quiet == [0, 1, 1, 2, 0, 1]


def test_a_thread_that_has_ended_is_nowhere_and_its_rank_still_answers(two):
    _, second = two
    second._model = SimpleNamespace(frame=lambda: None)
    second._observe(wanted=True)
    assert second._post().text == "runs"
    assert second._post().collective is None


def test_a_failure_is_posted_without_being_asked_for(two):
    first, _ = two
    first.tell("g", False, "rank 0 gave up")
    first.look()
    assert json.loads(first._store.get("syncbn/post/0"))[-1] == {"g": [False, "rank 0 gave up"]}


def test_without_other_ranks_there_is_nothing_to_do(world):
    alone = _Watchdog()
    alone.look()
    assert alone._store is None


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_only_a_store_over_tcp_is_kept_and_let_go_of_with_its_group(tmp_path, monkeypatch, kind):
    if kind == "tcp":
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    else:
        store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    one = _Watchdog()
    old, new = (Mock(**{"size.return_value": 2, "rank.return_value": 0}) for _ in range(2))
    with monkeypatch.context() as patched:
        patched.setattr(watchdog, "_world_group", lambda: old)
        one.tell("g", True, "told as the old groups end, and not posted yet")
        patched.setattr(watchdog, "_world_group", lambda: new)
        assert one._reach().add("one", 1) == 1
        assert not one._failures
        one._world = None
        one.tell("new", True, "before the first look")
        assert one._reach() is not None
        assert list(one._failures) == ["new"]
        assert (one._store is None) is (kind == "file")
    dist.destroy_process_group()
    assert one._reach() is None
    assert one._store is None


def _in_vain(waits, may_end):
    waits.set()
    may_end.wait(60)


def test_a_watchdog_that_waits_for_the_store_of_a_group_that_is_gone_is_replaced(monkeypatch):
    """A clone of a TCPStore whose server ended meanwhile takes some 300 s to fail; so does one of files."""
    old, new = (Mock(**{"size.return_value": 2, "rank.return_value": 0}) for _ in range(2))
    waits, may_end = threading.Event(), threading.Event()
    stuck = _Watchdog()
    monkeypatch.setattr(stuck, "_reached", lambda: _in_vain(waits, may_end))
    monkeypatch.setattr(watchdog, "_watchdog", stuck)
    monkeypatch.setattr(watchdog, "_world_group", lambda: old)
    stuck.start()
    stuck._wake.set()
    assert waits.wait(30)
    assert watchdog.watch() is stuck, "its group is still there"
    monkeypatch.setattr(watchdog, "_world_group", lambda: new)
    monkeypatch.setattr(_Watchdog, "look", lambda self: None)
    fresh = watchdog.watch()
    assert fresh is watchdog._watchdog is not stuck
    assert fresh._thread.is_alive()
    may_end.set()
    stuck._thread.join(30)
    assert not stuck._thread.is_alive()
    fresh.stop()


def test_a_forked_child_does_not_speak_for_its_parent(world, monkeypatch):
    child = _Watchdog()
    child.start()
    child.stop()
    child.__init__()  # as after a fork
    assert child._thread is None
    monkeypatch.setattr(watchdog, "_world_group", lambda: world)
    monkeypatch.setattr(watchdog, "in_parents_group", lambda: True)
    monkeypatch.setattr(type(world), "size", lambda self: 2)
    assert child._reach() is None


def test_the_thread_ends_when_it_is_told_to_and_survives_what_it_meets(monkeypatch, caplog):
    one = _Watchdog()
    met = threading.Semaphore(0)

    def fail():
        met.release()
        raise dist.DistError("the store went away")

    monkeypatch.setattr(one, "look", fail)
    with caplog.at_level(logging.DEBUG):
        one.start()
        for _ in range(2):
            one._wake.set()
            assert met.acquire(timeout=30)
        one.stop()
        one._thread.join(30)
    assert not one._thread.is_alive()
    assert caplog.text.count("DistError: the store went away") == 1
    assert activity(_frame(*USER)) == Activity("was last seen at train.py:12 in main")
