"""What a container does when it is told its role, and when it is asked whether it is well."""

import json
import re
import stat
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

DOCKER = Path(__file__).parents[2] / "docker"

sys.path.insert(0, str(DOCKER))
import health  # noqa: E402

# Entrypoint


FAKE = '#!/bin/sh\necho "$(basename "$0") $*"\nenv\n'


@pytest.fixture
def start(tmp_path):
    """Run the entrypoint with stand-ins for what it starts; they print their arguments and environment."""
    fakes, secrets = tmp_path / "bin", tmp_path / "secrets"
    secrets.mkdir()
    fakes.mkdir()
    for name in ("mlflow", "ray", "syncbn", "python", "mkdir"):
        (fakes / name).write_text(FAKE if name != "mkdir" else "#!/bin/sh\n")
        (fakes / name).chmod(0o755)

    def run(*arguments, secret=(), environ=()):
        for name, value in dict(secret).items():
            (secrets / name).write_text(value)
        environment = {
            "PATH": f"{fakes}:/usr/bin:/bin",
            "SYNCBN_SECRETS": str(secrets),
            "TMPDIR": str(tmp_path),
            **dict(environ),
        }
        command = [str(DOCKER / "entrypoint.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize(
    ("role", "missing"),
    [
        ("mlflow", "mlflow_admin_password"),
        ("ray-head", "ray_token"),
        ("ray-worker", "ray_token"),
    ],
)
@pytest.mark.parametrize("content", [None, ""], ids=["no secret", "empty secret"])
def test_a_service_without_its_secret_refuses_to_start(start, role, missing, content):
    result = start(role, secret={} if content is None else {missing: content})
    assert result.returncode == 7
    assert missing in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_short_token_is_refused(start):
    result = start("ray-head", secret={"ray_token": "secret"})
    assert result.returncode == 7
    assert "6 characters: at least 32" in result.stderr


@pytest.mark.parametrize("way", ["secret", "environ"])
def test_mlflow_asks_for_a_login_and_shows_nobody_what_is_not_theirs(start, way):
    if way == "secret":
        result = start("mlflow", secret={"mlflow_admin_password": "correct horse"})
    else:
        result = start("mlflow", environ={"MLFLOW_AUTH_ADMIN_PASSWORD": "correct horse"})
    command, environment = result.stdout.split("\n", 1)
    assert "--app-name basic-auth" in command
    assert "--allowed-hosts localhost:5000,127.0.0.1:5000,mlflow:5000" in command
    assert "--artifacts-destination /data/artifacts" in command
    assert "correct horse" not in command
    assert "MLFLOW_AUTH_ADMIN_PASSWORD=correct horse" in environment
    assert re.search("^MLFLOW_FLASK_SERVER_SECRET_KEY=[0-9a-f]{64}$", environment, re.MULTILINE)
    settings = (DOCKER / "mlflow-auth.ini").read_text()
    assert "default_permission = NO_PERMISSIONS" in settings
    assert "admin_password" not in settings


def test_ray_asks_for_the_token_and_never_shows_it(start):
    secret = {"ray_token": "t" * 32, "mlflow_trainer_password": "log me in"}
    for role in ("ray-head", "ray-worker"):
        result = start(role, secret=secret, environ={"RAY_NODE_ADDRESS": "10.0.0.1"})
        command, environment = result.stdout.split("\n", 1)
        assert "--node-ip-address 10.0.0.1" in command
        assert "t" * 32 not in command
        assert "RAY_AUTH_MODE=token\n" in environment
        assert f"RAY_AUTH_TOKEN={'t' * 32}\n" in environment
        assert "MLFLOW_TRACKING_USERNAME=trainer\n" in environment


def test_a_container_command_that_is_no_role_is_a_verb_of_syncbn(start):
    assert start("train", "norm=sync", "name=a b").stdout.startswith(
        "syncbn train norm=sync name=a b\n"
    )
    assert start().stdout.startswith("syncbn version\n")


def test_a_command_run_later_does_not_change_the_role(start, tmp_path):
    start("train")
    start("version")
    assert (tmp_path / "role").read_text() == "train\n"


def test_the_entrypoint_can_be_executed():
    assert (DOCKER / "entrypoint.sh").stat().st_mode & stat.S_IXOTH


# Health


class TrackingServer:
    """What `health.mlflow` talks to; it may forget what it is told."""

    def __init__(self, forgets=""):
        self.forgets = forgets
        self.tags = []
        self.file = b""

    def call(self, method, path, body=None):
        if path.endswith("set-experiment-tag") and self.forgets != "tags":
            self.tags = [{"key": body["key"], "value": body["value"]}]
        elif method == "PUT" and self.forgets != "files":
            self.file = body
        elif method == "GET" and "/mlflow-artifacts/" in path:
            return self.file
        return json.dumps({"experiment": {"experiment_id": "1", "tags": self.tags}}).encode()


def test_a_tracking_server_is_well_when_it_remembers(monkeypatch):
    server = TrackingServer()
    monkeypatch.setattr(health, "call", server.call)
    health.mlflow()
    assert server.tags[0]["value"].encode() == server.file


@pytest.mark.parametrize("what", ["tags", "files"])
def test_a_tracking_server_that_forgets_is_not_well(monkeypatch, capsys, what):
    monkeypatch.setattr(health, "call", TrackingServer(forgets=what).call)
    monkeypatch.setattr(sys, "argv", ["health.py", "mlflow"])
    assert health.main() == 1
    assert capsys.readouterr().err.startswith("mlflow is not well: ")


@pytest.fixture
def answering():
    """The address of a server on loopback that answers every request with the status of its path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_cluster_that_lets_a_stranger_in_is_not_well(answering):
    health._expect(f"{answering}/401", 401)
    health._expect(f"{answering}/200", 200)
    with pytest.raises(RuntimeError, match="answers 200 without a token, 401 is right"):
        health._expect(f"{answering}/200", 401)
    with pytest.raises(RuntimeError, match="answers 503"):
        health._expect(f"{answering}/503", 200)


def test_a_dead_server_is_not_well(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "unused")
    monkeypatch.setattr(sys, "argv", ["health.py", "mlflow"])
    assert health.main() == 1
    assert "refused" in capsys.readouterr().err


def test_a_role_that_serves_nobody_is_well_as_long_as_it_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["health.py", "train"])
    assert health.main() == 0
