"""Ranks that are stopped or killed while others wait for them, each in a process of its own."""

import os
import re
import signal
import threading
import time

import pytest
import torch.distributed as dist
from own_ranks import run_ranks
from test_watchdog_ranks import WAYS, _gather

import syncbn
from syncbn.norm.comm.exchange import exchange_of
from syncbn.norm.comm.fingerprint import RankLost

pytestmark = pytest.mark.untraced
each_way = pytest.mark.parametrize("way", WAYS)


def _wait_until_stopped(group):
    """Return once rank 1 has stopped itself: what is said of it, and when, must not depend on the machine's load."""
    while group.processes[1].state() != "T":
        time.sleep(0.01)


def stopped_for_a_while(way):
    os.environ["SYNCBN_EXCHANGE"] = way
    _gather(dist.group.WORLD)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        group = exchange_of(dist.group.WORLD)._group
        _wait_until_stopped(group)
        threading.Timer(2.0, os.kill, (group.processes[1].pid, signal.SIGCONT)).start()
    _gather(dist.group.WORLD)
    os.write(1, b"came through\n")


@each_way
@pytest.mark.slow_if(lambda way: way == "sockets")
def test_a_rank_that_was_stopped_for_a_while_is_waited_for(way):
    outcomes = run_ranks(__name__, "stopped_for_a_while", way)
    assert ["came through" in outcome.output for outcome in outcomes] == [True, True]


def stopped(way):
    os.environ["SYNCBN_EXCHANGE"] = way
    _gather(dist.group.WORLD)
    dist.barrier()
    group = exchange_of(dist.group.WORLD)._group
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    _wait_until_stopped(group)
    group.timeout_s = 2.0
    try:
        _gather(dist.group.WORLD)
    except RankLost as error:
        os.write(1, f"{error}\n".encode())
    os.kill(group.processes[1].pid, signal.SIGKILL)
    os._exit(0)


@each_way
@pytest.mark.slow_if(lambda way: way == "sockets")
def test_a_rank_that_stays_stopped_is_named_at_the_time_limit(way):
    said = run_ranks(__name__, "stopped", way)[0].output
    assert "waits for rank 1: it did not come within 2 s (it is stopped)" in said


def lose_one(way, when):
    os.environ["SYNCBN_EXCHANGE"] = way
    syncbn.SyncBatchNorm(3)
    if when == "later":
        _gather(dist.group.WORLD)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        _gather(dist.group.WORLD)
    except RankLost as error:
        os.write(1, f"{error}\n".encode())
        os._exit(error.exit_code)


@each_way
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.slow_if(lambda way, when: way != "shared" and when == "first")
def test_a_rank_that_is_killed_is_named_by_all(way, when):
    outcomes = run_ranks(__name__, "lose_one", way, when, world_size=3)
    assert [outcome.returncode for outcome in outcomes] == [75, -signal.SIGKILL, 75]
    for rank in (0, 2):
        said = outcomes[rank].output.splitlines()[-1]
        assert "is in the forward of SyncBatchNorm 'bn'" in said
        # a rank that has given up exits too, maybe before the last one looks
        assert re.search(
            r"waits for rank (1: it|0 and rank 1: they|1 and rank 2: they) exited", said
        )
