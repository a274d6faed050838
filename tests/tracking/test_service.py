"""The probe tells within seconds whether MLflow can be used, and if not, whose fault it is."""

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from programs import free_port

from syncbn.config import RunConfig, TrackingConfig
from syncbn.errors import NotAuthorised, ServiceUnreachable, UsageError
from syncbn.tracking.service import probe, store_uri, tracking_uri
from syncbn.tracking.ui import pages, refuse_taken, ui_command

Answer = Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """The URI of a server on this machine that answers every request with a status and a body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/x",
        "runs",
        "file:///tmp/x",
        "http://",
        "postgresql://h/db",
        "",
        "sqlite://x",
        "http://h:abc",
    ],
)
def test_an_unknown_scheme_is_a_usage_error_that_says_what_is_allowed(uri):
    with pytest.raises(UsageError, match=r"http://host:port, https://host or sqlite:///file"):
        probe(uri, timeout_s=60)


def test_a_server_that_answers_will_do():
    asked = []

    def answer(request):
        asked.append(request.path)
        return 200, b'{"experiments": []}'

    with server(answer) as uri:
        probe(uri, timeout_s=60)
    assert asked == ["/api/2.0/mlflow/experiments/search"]


def test_a_refused_connection_is_unreachable():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ServiceUnreachable, match="refused"):
            probe(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=60)


def test_an_unknown_host_is_unreachable():
    with pytest.raises(ServiceUnreachable):
        probe("http://no-such-host.invalid:5000", timeout_s=2)


def test_a_host_name_that_is_looked_up_without_end_is_unreachable(monkeypatch):
    over = threading.Event()

    def look_up(*_, **__):
        over.wait()
        raise OSError("late")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        with pytest.raises(ServiceUnreachable, match=r"no answer .* in 0\.2 s"):
            probe("http://slow.invalid:5000", timeout_s=0.2)
    finally:
        over.set()


def test_a_server_that_accepts_and_says_nothing_is_unreachable():
    refusal = pytest.raises(ServiceUnreachable, match=r"timed out|no answer")
    with socket.create_server(("127.0.0.1", 0)) as silent, refusal:
        probe(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_the_user_is_a_matter_of_rights(status):
    refusal = pytest.raises(NotAuthorised, match=f"{status}: who are you")
    with server(lambda _: (status, b"who are you?")) as uri, refusal:
        probe(uri, timeout_s=60)


@pytest.mark.parametrize(
    ("status", "body"), [(500, b"oh"), (404, b"no such page"), (200, b"<html>")]
)
def test_a_server_that_answers_an_error_or_no_json_is_no_working_mlflow(status, body):
    refusal = pytest.raises(ServiceUnreachable, match=r"no (working )?MLflow server")
    with server(lambda _: (status, body)) as uri, refusal:
        probe(uri, timeout_s=60)


def test_user_and_password_of_the_uri_are_sent_but_never_shown():
    said = []

    def answer(request):
        said.append(request.headers["Authorization"])
        return 401, b""

    with server(answer) as uri, pytest.raises(NotAuthorised) as error:
        probe(uri.replace("http://", "http://login0:secret@"), timeout_s=60)
    assert said == ["Basic " + base64.b64encode(b"login0:secret").decode()]
    assert "secret" not in str(error.value)


def test_a_token_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    said = []

    def answer(request):
        said.append(request.headers["Authorization"])
        return 200, json.dumps({}).encode()

    with server(answer) as uri:
        probe(uri, timeout_s=60)
    assert said == ["Bearer t0ken"]


def test_an_sqlite_store_may_be_there_or_come(tmp_path):
    probe(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0 and more")
    probe(f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["text.db", "folder", "text.db/below.db"])
def test_a_path_that_cannot_be_an_sqlite_store_is_unreachable(tmp_path, name):
    (tmp_path / "text.db").write_text("not a database")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ServiceUnreachable):
        probe(f"sqlite:///{tmp_path / name}")


def test_the_store_is_always_named_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(RunConfig(runs_dir="runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    own = RunConfig(tracking=TrackingConfig(uri="sqlite:///x.db"))
    assert tracking_uri(own) == f"sqlite:///{tmp_path}/x.db"
    http = RunConfig(tracking=TrackingConfig(uri="http://host:5000"))
    assert tracking_uri(http) == "http://host:5000"


def test_the_pages_need_a_store(tmp_path):
    with pytest.raises(UsageError, match="no MLflow store"):
        ui_command(tmp_path, free_port(), "127.0.0.1")


def test_the_pages_need_a_store_of_mlflow(tmp_path):
    Path(store_uri(tmp_path).removeprefix("sqlite:///")).write_text("text")
    with pytest.raises(UsageError, match="not a store of MLflow"):
        pages(tmp_path)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}"):
            refuse_taken(port, "127.0.0.1")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_out_of_range_is_named(port):
    with pytest.raises(UsageError, match=f"port={port}"):
        refuse_taken(port, "127.0.0.1")
