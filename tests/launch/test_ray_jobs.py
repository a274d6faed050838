"""Jobs on a real cluster of one node that asks for a token: sent, followed, stopped, refused.

`test_ray_verbs.py` has the verbs before a dashboard that only answers as Ray's.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from programs import Bench, complaint, free_port, losses, wait_until
from refused_jobs import REFUSED

pytestmark = pytest.mark.slow
PATIENT = (
    "from syncbn.launch import ray_dashboard; ray_dashboard.TIMEOUT_S = 300.0;"
    "from syncbn.cli import main; main()"
)
SYNCBN = (sys.executable, "-c", PATIENT)
"""The command, with time for a dashboard on a busy machine."""

TINY = ("tracking=journal", "model.hidden=[8]", "train.per_rank_batch=4", "launcher.num_workers=2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A bench whose environment names a running cluster and its token."""
    bench = Bench(tmp_path_factory.mktemp("jobs"))
    token = bench.folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    port = free_port()
    bench.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SYNCBN_ADDRESS": f"http://127.0.0.1:{port}",
    }
    with tempfile.TemporaryDirectory(prefix="sb-", ignore_cleanup_errors=True) as folder:
        bench.environ["SYNCBN_TEST_SESSION"] = folder
        head = start_head(bench, port, folder)
        try:
            wait_until_up(bench.environ["SYNCBN_ADDRESS"], token.read_text())
            yield bench
        finally:
            end(head, bench)


def start_head(bench, port, folder):
    options = ["--head", "--block", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
               f"--port={free_port()}", f"--ray-client-server-port={free_port()}",
               f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}",
               "--num-cpus=2", "--disable-usage-stats"]  # fmt: skip
    ray = str(Path(sys.executable).with_name("ray"))
    return subprocess.Popen(
        [ray, "start", *options],
        env={k: v for k, v in bench.environment().items() if k != "PYTHONPATH"},  # jobs bring it
        cwd=bench.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until_up(address, token):
    request = urllib.request.Request(
        f"{address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
    )

    def up():
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)["data"]["result"]["result"]
        except OSError:
            return False

    wait_until(up)


def end(head, bench):
    """Kill the cluster's session; its workers and agents, in sessions of their own, notice and follow."""
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    left = bench.left_running()
    bench.kill_all()
    assert not left


def submit(cluster, *arguments):
    result = cluster.run(*SYNCBN, "submit", *arguments, f"runs_dir={cluster.folder}/runs", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.timeout(1800)
def test_a_job_gives_the_bits_of_a_local_run_and_saves_when_it_is_stopped(cluster, monkeypatch):
    redirection = dict.fromkeys(("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"), "http://127.0.0.1:1")
    monkeypatch.setattr(cluster, "environ", cluster.environ | redirection)  # not followed
    run = (*TINY, "data=synthetic", "optim.schedule=constant", "seed=4")
    job = submit(cluster, "train", *run, "train.steps=10000000", "name=job")
    folder = Path(job["files"])
    assert folder == cluster.folder / "runs" / "job"
    wait_for_losses(folder)
    assert cluster.run(*SYNCBN, "stop", job["job_id"]).returncode == 0
    assert cluster.run(*SYNCBN, "status", job["job_id"]).returncode == 130
    assert "checkpoint saved" in cluster.run(*SYNCBN, "logs", job["job_id"]).stdout
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert records[0]["git"], "the job knows its revision, though it runs from a copy"
    assert (records[-1]["event"], records[-1]["status"]) == ("end", "stopped")
    assert (folder / "checkpoints" / "LATEST").is_file()
    local = cluster.run(*SYNCBN, "train", *run, "train.steps=10", "name=local")
    assert local.returncode == 0, local.stderr
    assert losses(folder)[:10] == losses(cluster.folder / "runs" / "local")


def test_a_job_takes_the_code_and_its_configs_along_and_little_else(cluster):
    session = Path(cluster.environ["SYNCBN_TEST_SESSION"]) / "session_latest"
    copies = session.glob("runtime_resources/working_dir_files/_ray_pkg_*/")
    copy = next(path for path in copies if path.is_dir())
    assert {"syncbn", "conf", "jobs"} <= {path.name for path in copy.iterdir()}
    assert (copy / "conf" / "data" / "digits.yaml").is_file()
    assert not {".git", ".venv", "tests", "runs", "docs"} & {path.name for path in copy.iterdir()}
    assert sum(path.stat().st_size for path in copy.rglob("*") if path.is_file()) < 3 * 2**19


def wait_for_losses(folder):
    wait_until(lambda: (folder / "journal.jsonl").exists() and losses(folder))


@pytest.mark.timeout(1200)
def test_a_project_is_sent_with_our_package_and_its_configs_are_used(cluster):
    project = cluster.folder / "project"
    (project / "conf" / "model").mkdir(parents=True)
    (project / "conf" / "model" / "small.yaml").write_text("name: mlp\nhidden: [5]\n")
    own = "defaults: [base, _self_, override model: small]\nname: mine\ntrain: {steps: 3}\n"
    (project / "conf" / "config.yaml").write_text(own)
    runs = f"runs_dir={cluster.folder}/runs"
    sent = cluster.run(*SYNCBN, "submit", "train", "tracking=journal", runs, "--json", cwd=project)
    assert sent.returncode == 0, sent.stderr
    job = json.loads(sent.stdout)
    followed = cluster.run(*SYNCBN, "logs", "-f", job["job_id"])
    assert followed.returncode == 0, followed.stdout
    folder = cluster.folder / "runs" / "mine"
    assert len(losses(folder)) == 3
    start = json.loads((folder / "journal.jsonl").read_text().splitlines()[0])
    assert start["config"]["model"]["hidden"] == [5]
    session = Path(cluster.environ["SYNCBN_TEST_SESSION"]) / "session_latest"
    modules = session / "runtime_resources" / "py_modules_files"
    assert list(modules.glob("_ray_pkg_*/syncbn/conf/main.yaml"))


@pytest.mark.timeout(1200)
def test_a_job_that_fails_passes_its_exit_code_on(cluster):
    job = submit(cluster, "train", *TINY, "data=mnist", "data.root=/nowhere", "name=no-data")
    assert cluster.run(*SYNCBN, "logs", "-f", job["job_id"]).returncode == 3
    status = cluster.run(*SYNCBN, "status", job["job_id"])
    assert (status.returncode, "FAILED" in status.stdout) == (3, True)


def test_jobs_are_listed_with_what_was_sent_and_no_token(cluster):
    listed = cluster.run(*SYNCBN, "jobs", "--json").stdout
    assert "-m syncbn train" in listed
    assert Path(cluster.environ["RAY_AUTH_TOKEN_PATH"]).read_text() not in listed


@pytest.mark.parametrize(("overrides", "environ", "code", "reason"), REFUSED)
def test_a_job_that_cannot_run_is_refused_before_it_is_sent(
    cluster, overrides, environ, code, reason, monkeypatch
):
    monkeypatch.setattr(cluster, "environ", cluster.environ | environ)
    before = cluster.run(*SYNCBN, "jobs", "--json").stdout
    result = cluster.run(*SYNCBN, "submit", "train", *overrides)
    assert result.returncode == code
    assert reason in complaint(result)
    assert cluster.run(*SYNCBN, "jobs", "--json").stdout == before


def test_an_unknown_job_is_2(cluster):
    for verb in ("status", "logs", "stop"):
        result = cluster.run(*SYNCBN, verb, "no-such-job")
        assert result.returncode == 2
        assert "no-such-job" in complaint(result)
