"""Ray as a launcher: the same numbers, failures that say why, and nothing left behind."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from programs import SUPPORT, TRAIN, cmdline, losses, wait_until

from syncbn.errors import InfrastructureError, RankFailed
from syncbn.tracking import read_journal

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


LONG = ("tracking=journal", "train.steps=400", "train.per_rank_batch=8", "model.hidden=[16]", "launcher.num_workers=2",
        "train.checkpoint_every=20", "train.agree_every=5", "train.progress=false", "name=it")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_worker_is_killed_goes_on_by_itself_to_the_bits_of_one_that_was_not(
    bench, tmp_path, rank
):
    folders = [tmp_path / name / "it" for name in ("whole", "cut")]
    whole = bench.run(*TRAIN, *LONG, "runs_dir=whole")
    assert whole.returncode == 0, whole.stderr
    command = (*TRAIN, *LONG, "runs_dir=cut", "launcher=ray")
    process = bench.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: (folders[1] / "journal.jsonl").exists() and len(losses(folders[1])) > 50)
    _worker(process, folders[1], rank).kill()
    _, said = process.communicate(timeout=1000)
    assert process.returncode == 0, said
    assert re.search(rf"rank {rank} died \(.*\): restart 1 of 3, going on from step \d+0", said)
    assert losses(folders[0]) == losses(folders[1])
    states = [(f / "checkpoints/step-000400/model.safetensors").read_bytes() for f in folders]
    assert states[0] == states[1]
    events = [r["event"] for r in read_journal(folders[1] / "journal.jsonl") if "event" in r]
    story = [event for event in events if event != "checkpoint"]
    assert story == ["start", "end", "restart", "start", "resume", "end"]
    assert not bench.left_running()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_cluster_of_ones_own_that_dies_is_named_within_seconds(bench, tmp_path, server):
    before = session_folders()
    command = (*TRAIN, *LONG, "train.steps=100000", "launcher=ray", "launcher.max_restarts=0")
    process = bench.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "runs" / "it" / "journal.jsonl"
    wait_until(lambda: journal.exists() and len(losses(journal.parent)) > 50)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.name() == server).kill()
    _, said = process.communicate(timeout=60)  # Ray would take a minute, and say nothing
    assert process.returncode == 75, said
    assert "of this launch's own cluster died: start it again" in said
    assert list(read_journal(journal))[-1]["event"] == "end"
    assert not bench.left_running()
    assert session_folders() <= before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_of_a_cluster_outlives_a_launch_that_is_killed(bench, tmp_path):
    before = session_folders()
    command = (*TRAIN, *LONG, "train.steps=100000", "launcher=ray")
    with bench.start(*command, stderr=subprocess.DEVNULL) as process:
        journal = tmp_path / "runs" / "it" / "journal.jsonl"
        wait_until(lambda: journal.exists() and len(losses(journal.parent)) > 50)
        process.kill()
    assert not bench.left_running(patience_s=20)  # Ray's would stay for a minute
    assert session_folders() <= before


def _worker(process, folder, rank):
    """The process of `rank`: rank 0 holds the run's folder."""
    main = int((folder / ".lock").read_text().split()[1])
    workers = psutil.Process(process.pid).children(recursive=True)
    others = [p for p in workers if "ray::Worker" in cmdline(p.pid) and p.pid != main]
    return psutil.Process(main) if rank == 0 else others[0]


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
    locations = [
        ray.Location("b", ("1", "3")),
        ray.Location("a", ()),
        ray.Location("b", ("0", "2")),
    ]
    order = ray.in_order_of_ranks(dict(enumerate(locations)))
    assert order == [2, 0, 1]
    found = ray.environments([locations[number] for number in order], "10.0.0.9", 4321)
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE")
    assert [[each[name] for name in names] for each in found] == [
        ["0", "0", "2", "0", "3"],
        ["1", "1", "2", "0", "3"],
        ["2", "0", "1", "1", "3"],
    ]
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found} == {("10.0.0.9", "4321")}
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in found] == ["0,1,2,3", "0,1,2,3", None]


def test_a_rank_alone_has_no_group():
    ray = pytest.importorskip("syncbn.runtime.ray")
    assert ray.environments([ray.Location("a", ("0",))], "10.0.0.9", 4321) == [{}]


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


@pytest.fixture
def own():
    """The module of a launch's own servers; what they set in the environment goes with the test."""
    with patch.dict(os.environ):
        yield pytest.importorskip("syncbn.launch.ray_servers")


@pytest.fixture
def session(own, monkeypatch, tmp_path):
    """The folder that the servers get."""
    folder = tmp_path / "session"
    folder.mkdir()
    monkeypatch.setattr(own.tempfile, "mkdtemp", lambda **_: str(folder))
    return folder


def test_a_cluster_that_does_not_start_can_be_tried_again(own, session, monkeypatch):
    cluster = pytest.importorskip("syncbn.launch.ray_cluster")
    monkeypatch.setattr(own, "_command", lambda _: ["sh", "-c", "echo no GCS; exit 1"])
    told = r"^Ray did not start on this machine \(no GCS\)"
    with pytest.raises(InfrastructureError, match=told), cluster.OwnCluster():
        pytest.fail("it has not started")
    assert not session.exists()


def test_servers_that_nobody_asks_for_end_with_the_launch(own, session, monkeypatch):
    monkeypatch.setattr(own, "_command", lambda _: ["sleep", "1000"])
    monkeypatch.setattr(own.atexit, "register", lambda _: None)
    own.start_early()
    (early,) = own._early
    wait_until(early._children)
    own.drop_early()
    assert not early._children()
    assert not session.exists()


@pytest.mark.slow
def test_the_service_for_clients_of_a_cluster_of_ones_own_asks_for_the_token(own):
    grpc = pytest.importorskip("grpc")
    servers = own.Servers()
    try:
        wait_until(lambda: [p for p in servers._children() if _port_of_clients(p)])
        (port,) = {port for p in servers._children() if (port := _port_of_clients(p))}
        wait_until(lambda: said_to_a_client(grpc, port, token="wrong") != "UNAVAILABLE")
        assert said_to_a_client(grpc, port, token=None) == "UNAUTHENTICATED"
        assert said_to_a_client(grpc, port, token="wrong") == "UNAUTHENTICATED"
        token = os.environ["RAY_AUTH_TOKEN"]
        assert said_to_a_client(grpc, port, token=token) not in ("UNAUTHENTICATED", "UNAVAILABLE")
    finally:
        servers.end()


def _port_of_clients(process):
    """The port of Ray's service for clients elsewhere, where `process` is that."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    ports = [word.removeprefix("--port=") for word in words if word.startswith("--port=")]
    return int(ports[0]) if "ray.util.client.server" in words else None


def said_to_a_client(grpc, port, token):
    """The status with which the service answers one who asks what the cluster is."""
    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")
        try:
            ask(b"", timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"
