"""Ranks that die, stop, or run in eval mode from the start, each in a process of its own."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from own_ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.norm.comm.transports import shared_memory as shared
from syncbn.norm.comm.exchange import exchange_of

pytestmark = pytest.mark.skipif(
    shared._native() is None, reason="the native library is not built: there is no shared memory"
)


def _say(text):
    os.write(1, f"{text}\n".encode())  # not lost when a process is killed


def _gather(layer="bn1"):
    return exchange_of(dist.group.WORLD).gather(
        torch.ones(3), kind=1, layer=layer, channels=1, dtype=torch.float32, needs_grad=True
    )


def _say_what_is_raised():
    began = time.monotonic()
    try:
        _gather()
        _say("came together")
    except RuntimeError as error:
        _say(f"{type(error).__name__} after {time.monotonic() - began:.0f} s: {error}")


def _ranks(function, *arguments, world_size=2):
    outcomes = run_ranks(__name__, function, *arguments, world_size=world_size)
    assert not list(Path("/dev/shm").glob("*syncbn*"))
    return [outcome.output for outcome in outcomes]


def end(how):
    _gather()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return
    _say_what_is_raised()
    _say_what_is_raised()
    if how == "kill":
        os._exit(0)  # torch may wait for the dead one


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_rank_that_ended_is_named_at_once_and_by_all(how):
    for rank, said in enumerate(_ranks("end", how, world_size=3)):
        if rank != 1:
            first, second = said.splitlines()[-2:]
            for line in (first, second):
                assert "after 0 s: rank" in line or "after 1 s: rank" in line
                assert "waits for rank 1: it" in line
            assert first.startswith("RankLost") or "destroyed its process group" in first


def stop(until_continued_s):
    _gather()
    if dist.get_rank() == 1:
        waker = f"sleep {until_continued_s}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", waker])
        os.kill(os.getpid(), signal.SIGSTOP)
    _say_what_is_raised()


@pytest.mark.slow
def test_a_rank_that_was_stopped_for_a_while_is_waited_for():
    assert [said.splitlines()[-1] for said in _ranks("stop", "5")] == ["came together"] * 2


def stop_for_good():
    _gather()
    exchange_of(dist.group.WORLD)._transport._timeout_s = 2.0
    if dist.get_rank() == 1:
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -KILL {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    _say_what_is_raised()
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_stays_stopped_is_named_at_the_time_limit():
    said = _ranks("stop_for_good")[0]
    assert "waits for rank 1: it did not come within 2 s (it is stopped)" in said


def eval_on_one_rank(first_exchange, wait):
    """Rank 1 runs in eval mode, alone, and then blocks in a collective, as under DistributedDataParallel."""
    if first_exchange == "before":
        _gather()
    else:
        dist.barrier()
    exchange = exchange_of(dist.group.WORLD)
    if dist.get_rank() == 0:
        time.sleep(float(wait))
        _say_what_is_raised()
        os._exit(0)  # the other rank is blocked in a collective: nothing more to do together
    time.sleep(max(0.0, 1 - float(wait)))
    try:
        exchange.pass_by("bn1", False)
        exchange.pass_by("bn1", True)
        dist.barrier()
    except RuntimeError as error:
        _say(f"{type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("first_exchange", ["before", "never"])
def test_eval_mode_on_one_rank_is_an_error_within_ten_seconds(first_exchange):
    """The rank in eval mode was faster, and is blocked when the other comes."""
    waiting, _ = _ranks("eval_on_one_rank", first_exchange, "2")
    said = waiting.splitlines()[-1]
    assert "backward of this layer in eval mode and has been blocked" in said
    assert 4 <= int(said.split()[2]) <= 7


@pytest.mark.slow
@pytest.mark.parametrize("first_exchange", ["before", "never"])
def test_eval_mode_on_the_slower_rank_fails_on_both_at_once(first_exchange):
    waiting, passing = _ranks("eval_on_one_rank", first_exchange, "0")
    for said in (waiting, passing):
        assert "rank 1 runs the backward pass of SyncBatchNorm 'bn1' in eval mode; rank 0" in said
    assert "RanksDisagree after 1 s" in waiting


def train_with_one_rank_in_eval(first_steps, late_rank):
    """Two ranks under DistributedDataParallel, one of which forgets `model.train()`."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(nn.Sequential(*layers)))
    for _ in range(int(first_steps)):
        model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    model.train(dist.get_rank() == 0)
    time.sleep(0.3 * (dist.get_rank() == int(late_rank)))
    began = time.monotonic()
    try:
        model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    except RuntimeError as error:
        _say(f"{type(error).__name__} after {time.monotonic() - began:.0f} s: {error}")
    os._exit(0)


@pytest.mark.parametrize(("first_steps", "late_rank"), [("0", "1"), ("1", "0")])
def test_a_training_step_with_one_rank_in_eval_mode_fails_on_both_by_name(first_steps, late_rank):
    for said in _ranks("train_with_one_rank_in_eval", first_steps, late_rank):
        assert "RanksDisagree after " in said
        assert int(said.split("RanksDisagree after ")[1].split()[0]) < 10
        assert "rank 1 runs the backward pass of SyncBatchNorm '4' in eval mode; rank 0" in said
