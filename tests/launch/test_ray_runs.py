"""Ray as a launcher: the same numbers, failures that say why, and nothing left behind."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from programs import SUPPORT, TRAIN, losses

from syncbn.errors import RankFailed

RUN = ("tracking=journal", "train.steps=12", "train.per_rank_batch=8", "model.hidden=[16]",
       "launcher.num_workers=2", "seed=3")  # fmt: skip


def session_folders():
    return set(Path("/tmp").glob("syncbn-*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_gives_the_bits_of_torchrun_and_leaves_nothing_behind(bench, tmp_path):
    before = session_folders()
    for launcher in ("local", "ray"):
        result = bench.run(*TRAIN, *RUN, f"launcher={launcher}", f"name={launcher}")
        assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "INFO" not in result.stderr
    assert losses(tmp_path / "runs" / "ray") == losses(tmp_path / "runs" / "local")
    assert len(losses(tmp_path / "runs" / "ray")) == 12
    assert not bench.left_running()
    assert session_folders() <= before
    assert not (tmp_path / ".ray").exists(), "no token in the home folder"
    assert not list((tmp_path / "runs" / "ray").glob(".ray*"))


GONE = "The actor died unexpectedly."


def cause(**ends):
    """What is reported of ranks that ended as `rank_N=(message, exit code)`, or as None where the process died."""
    ray_ranks = pytest.importorskip("syncbn.launch.ray_ranks")
    by_rank = {
        int(rank.removeprefix("rank_")): ray_ranks.RayError(GONE)
        if end is None
        else ray_ranks.Ended(failure=RankFailed(*end))
        for rank, end in ends.items()
    }
    failure = ray_ranks.cause(by_rank)
    return str(failure), failure.exit_code


def test_a_rank_that_says_why_is_heard_before_those_it_took_along():
    lost = ("RuntimeError: Connection closed by peer", 1)
    assert cause(rank_0=lost, rank_1=("no data", 3)) == ("no data", 3)


def test_a_dead_worker_can_be_tried_again():
    message, code = cause(rank_1=None)
    assert code == 75
    assert message.startswith(f"rank 1 died (RayError: {GONE}): start it")


def test_a_dead_worker_is_heard_before_those_that_lost_it_and_after_a_bug():
    lost, bug = ("another rank exited", 75), ("KeyError: 'x'", 1)
    assert cause(rank_0=lost, rank_1=None)[0].startswith("rank 1 died")
    assert cause(rank_0=bug, rank_1=None) == bug
    assert cause(rank_0=lost) == lost


def test_ranks_are_numbered_node_by_node_and_by_gpu():
    ray = pytest.importorskip("syncbn.runtime.ray")
    seats = [
        ray.Seat("b", "10.0.0.2", ("1", "3")),
        ray.Seat("a", "10.0.0.1", ()),
        ray.Seat("b", "10.0.0.2", ("0", "2")),
    ]
    order = ray.in_order(dict(enumerate(seats)))
    assert order == [2, 0, 1]
    found = ray.environments([seats[number] for number in order], 4321)
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE")
    assert [[each[name] for name in names] for each in found] == [
        ["0", "0", "2", "0", "3"],
        ["1", "1", "2", "0", "3"],
        ["2", "0", "1", "1", "3"],
    ]
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found} == {("10.0.0.2", "4321")}
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in found] == ["0,1,2,3", "0,1,2,3", None]


def test_a_rank_alone_has_no_group():
    ray = pytest.importorskip("syncbn.runtime.ray")
    assert ray.environments([ray.Seat("a", "10.0.0.1", ("0",))], 4321) == [{}]


def test_the_interface_of_an_address_is_found():
    from syncbn.runtime.ray import interface_of

    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("203.0.113.7") is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_failing_ranks_come_back_with_their_exit_codes(bench, tmp_path):
    bench.environ["PYTHONPATH"] = str(SUPPORT)
    program = str(SUPPORT / "ray_work.py")
    result = bench.run(sys.executable, program, str(tmp_path / "runs"), timeout=1000)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])  # Ray tells of the dead worker before
    assert outcomes["says_why"] == [3, "rank 1 has no data"]
    code, message = outcomes["bug"]
    assert code == 1
    assert re.fullmatch(r"KeyError: 'missing' at ray_worker\.py:\d+", message)
    assert outcomes["dies"][0] == 75
    assert not bench.left_running()
