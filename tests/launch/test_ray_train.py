"""Ray Train as a launcher: the same numbers, failures that say why, and nothing left behind."""

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


def group_error(failures):
    return pytest.importorskip("ray.train").WorkerGroupError("it failed", failures)


def test_a_rank_that_says_why_is_heard_before_those_it_took_along():
    from syncbn.launch.ray_fit import cause

    lost = RankFailed("RuntimeError: Connection closed by peer", 1)
    assert str(cause(group_error({0: lost, 1: RankFailed("no data", 3)}))) == "no data"


def test_a_dead_worker_can_be_tried_again():
    from syncbn.launch.ray_fit import cause

    failure = cause(group_error({1: ConnectionError("the worker is gone\nlong story")}))
    assert failure.exit_code == 75
    assert str(failure).startswith("rank 1 died (ConnectionError: the worker is gone): start it")


def test_a_dead_worker_is_heard_before_those_that_lost_it_and_after_a_bug():
    from syncbn.launch.ray_fit import cause

    lost, bug = RankFailed("another rank exited", 75), RankFailed("KeyError: 'x'", 1)
    assert str(cause(group_error({0: lost, 1: ConnectionError("gone")}))).startswith("rank 1 died")
    assert str(cause(group_error({0: lost, 1: bug}))) == "KeyError: 'x'"
    assert cause(group_error({0: lost})) is lost


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
    assert re.fullmatch(r"KeyError: 'missing' at ray_fit\.py:\d+", message)
    assert outcomes["dies"][0] == 75
    assert not bench.left_running()
