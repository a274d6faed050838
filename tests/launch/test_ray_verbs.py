"""The verbs that talk to a cluster, before a dashboard as Ray's; `test_ray_jobs.py` has them on a cluster."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
from programs import Bench, complaint
from refused_jobs import REFUSED

NODE = {"node_id": "n", "state": "ALIVE", "is_head_node": True, "resources_total": {"CPU": 2.0}}


class Cluster(ThreadingHTTPServer):
    """A dashboard that asks for the token `right` and has one job, `mine`, which runs until it is stopped."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.job = {"submission_id": "mine", "type": "SUBMISSION", "status": "RUNNING",
                    "start_time": 1, "end_time": None, "message": "", "driver_exit_code": None,
                    "entrypoint": "python -m syncbn train"}  # fmt: skip
        self.num_sent = 0

    def answer(self, method, path):
        """The body for a request, or None where there is no such thing."""
        if path == "/api/jobs/mine/stop" and method == "POST":
            self.job["status"] = "STOPPED"
        if path == "/api/jobs/" and method == "POST":
            self.num_sent += 1
        return {
            "/api/version": {"ray_version": version("ray")},
            "/api/v0/nodes?limit=10000": {"data": {"result": {"result": [NODE]}}},
            "/api/jobs/": [self.job],
            "/api/jobs/mine": self.job,
            "/api/jobs/mine/logs": {"logs": "step 1\ncheckpoint saved\n"},
            "/api/jobs/mine/stop": {"stopped": True},
        }.get(path)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.answer(self.command, self.path)
        status = 200 if body is not None else 404
        if self.headers["Authorization"] != "Bearer right":
            status, body = 401, "Unauthorized"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body or "Job does not exist").encode())

    def do_POST(self):
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def cluster():
    server = Cluster()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def bench(tmp_path, cluster):
    address = f"http://127.0.0.1:{cluster.server_port}"
    return Bench(tmp_path, environ={"SYNCBN_ADDRESS": address, "RAY_AUTH_TOKEN": "right"})


def test_a_job_is_listed_followed_and_stopped_and_its_status_is_an_exit_code(bench):
    listed = bench.call("jobs", "--json").stdout
    assert "-m syncbn train" in listed
    assert "right" not in listed
    assert bench.call("status", "mine").returncode == 0
    assert bench.call("stop", "mine").returncode == 0
    assert bench.call("status", "mine").returncode == 130
    assert "checkpoint saved" in bench.call("logs", "mine").stdout


@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_an_unknown_job_is_2(bench, verb):
    result = bench.call(verb, "no-such-job")
    assert result.returncode == 2
    assert "Job does not exist" in complaint(result)


@pytest.mark.parametrize(("overrides", "environ", "code", "reason"), REFUSED)
def test_a_job_that_cannot_run_is_refused_before_it_is_sent(
    bench, cluster, overrides, environ, code, reason
):
    bench.environ |= environ
    result = bench.call("submit", "train", *overrides)
    assert result.returncode == code
    assert reason in complaint(result)
    assert cluster.num_sent == 0
