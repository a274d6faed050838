"""How Ray clusters are found, entered and sent jobs, as far as it can be told without one."""

import json
import shlex
import socket
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from syncbn.compose import compose
from syncbn.errors import NotAuthorised, ServiceUnreachable, UsageError
from syncbn.launch.ray_access import cluster_address, read_token, require_capacity
from syncbn.launch.ray_dashboard import (
    Dashboard,
    exit_code_of,
    require_same_ray,
    require_token_mode,
)
from syncbn.launch.ray_jobs import entrypoint, files, job_overrides, mlflow_variables
from syncbn.provenance import versions

HERE = Path("/submitted/from")


@pytest.fixture
def dashboard():
    """Starts servers that answer every request with one status and body; yields the starter."""
    servers, over = [], threading.Event()

    def start(status, body, hangs=False):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if hangs:
                    over.wait()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_dashboard_that_asks_for_a_token_is_accepted(dashboard):
    require_token_mode(dashboard(401, "Unauthorized"))


def test_a_dashboard_that_lets_anybody_in_is_refused(dashboard):
    with pytest.raises(NotAuthorised, match="answers without a token"):
        require_token_mode(dashboard(200, json.dumps({"ray_version": "2.60.0"})))


@pytest.mark.parametrize(
    ("status", "body"), [(200, "<html>hello</html>"), (404, "nothing"), (500, "{}")]
)
def test_another_service_is_no_dashboard(dashboard, status, body):
    with pytest.raises(ServiceUnreachable, match="no Ray dashboard"):
        require_token_mode(dashboard(status, body))


def test_a_port_that_speaks_no_http_is_named_in_words_alone():
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        answer = threading.Thread(target=_answer_in_frames, args=(head,), daemon=True)
        answer.start()
        with pytest.raises(ServiceUnreachable, match=r"speaks no HTTP: .*8265") as refused:
            require_token_mode(f"http://127.0.0.1:{head.getsockname()[1]}")
        answer.join()
    assert str(refused.value).isprintable()


def _answer_in_frames(head):
    connection, _ = head.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\xff")


def test_variables_that_are_not_read_and_proxies_are_named(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    with pytest.raises(
        ServiceUnreachable, match=r"RAY_ADDRESS=http://other:8265 is not read: .*SYNCBN_"
    ):
        require_token_mode("http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(ServiceUnreachable, match="the proxy of HTTP_PROXY: add head to NO_PROXY"):
        require_token_mode("http://head:8265")


@pytest.mark.parametrize(
    ("environ", "sent"),
    [
        ({"MLFLOW_TRACKING_URI": "http://h:5", "MLFLOW_EXPERIMENT_NAME": "e"}, True),
        ({"MLFLOW_TRACKING_URI": "http://other"}, False),
    ],
)
def test_a_job_reads_mlflows_variables_that_it_was_planned_with(environ, sent):
    cfg = compose(["tracking.uri=http://h:5", "tracking.experiment=e"])
    assert mlflow_variables(cfg, environ) == (environ if sent else {})


def test_no_password_is_sent_in_a_jobs_environment():
    cfg = compose([])
    cfg.tracking.uri = "http://u:p@h:5"
    with pytest.raises(UsageError, match=r"MLFLOW_TRACKING_URI=http://\*\*\*@h:5 is not sent"):
        mlflow_variables(cfg, {"MLFLOW_TRACKING_URI": "http://u:p@h:5"})


def test_nothing_at_the_address_is_unreachable():
    with pytest.raises(ServiceUnreachable, match="no Ray dashboard answers"):
        require_token_mode("http://127.0.0.1:1")


def test_a_dashboard_that_hangs_is_unreachable(dashboard, monkeypatch):
    monkeypatch.setattr("syncbn.launch.ray_dashboard.TIMEOUT_S", 0.2)
    with pytest.raises(ServiceUnreachable, match="timed out"):
        require_token_mode(dashboard(401, "", hangs=True))


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "head:8265", "auto", "ftp://head", "http://", "http://a:b@head"]
)
def test_only_a_plain_dashboard_url_is_taken(address):
    with pytest.raises(UsageError, match="--address"):
        require_token_mode(address)


def test_a_refused_token_and_a_missing_job_are_told_apart(dashboard):
    with pytest.raises(NotAuthorised, match="refuses this token"):
        Dashboard(dashboard(403, "Forbidden"), "wrong").jobs()
    with pytest.raises(UsageError, match="Job x does not exist"):
        Dashboard(dashboard(404, "Job x does not exist"), "right").job("x")


def test_another_minor_version_of_ray_is_refused(dashboard):
    found = Dashboard(dashboard(200, json.dumps({"ray_version": "2.40.1"})), "right")
    require_same_ray(found, "2.40.9")
    with pytest.raises(UsageError, match=r"runs Ray 2.40.1, this is 2.60.0"):
        require_same_ray(found, "2.60.0")


@pytest.mark.parametrize("allow", [True, False])
def test_a_head_without_token_mode_is_refused(allow):
    grpc = pytest.importorskip("grpc")
    from ray.core.generated import gcs_service_pb2

    from syncbn.launch.ray_cluster import cluster_resources

    def answer(_request, context):
        if not allow:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        return gcs_service_pb2.GetAllNodeInfoReply()

    method = grpc.unary_unary_rpc_method_handler(
        answer, response_serializer=gcs_service_pb2.GetAllNodeInfoReply.SerializeToString
    )
    server = grpc.server(futures.ThreadPoolExecutor(1))
    service = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"GetAllNodeInfo": method}
    )
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        reason = "answers without a token" if allow else "refuses this token"
        with pytest.raises(NotAuthorised, match=reason):
            cluster_resources(f"127.0.0.1:{port}", "some token")
    finally:
        server.stop(None)


def test_a_head_that_does_not_answer_is_unreachable():
    from syncbn.launch.ray_cluster import cluster_resources

    with pytest.raises(ServiceUnreachable, match=r"127.0.0.1:1: UNAVAILABLE"):
        cluster_resources("127.0.0.1:1", "some token")


def test_auto_is_the_cluster_of_the_job_or_of_this_machine():
    assert cluster_address(None, {"RAY_ADDRESS": "10.0.0.1:6379"}) is None
    assert cluster_address("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert cluster_address("auto", {}) == "127.0.0.1:6379"
    assert cluster_address("head:1234", {}) == "head:1234"


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://head:8265", "head", "head:0", ":1", "head:x"]
)
def test_addresses_of_other_kinds_are_refused_for_a_cluster(address):
    with pytest.raises(UsageError, match=r"launcher.address="):
        cluster_address(address, {})


def test_a_token_is_read_from_the_nearest_place(tmp_path):
    (tmp_path / "named").write_text("from the file\n")
    environ = {
        "RAY_AUTH_TOKEN": "from the variable",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "named"),
    }
    assert read_token(environ) == "from the variable"
    assert read_token(environ, tmp_path / "named") == "from the file"
    assert read_token({"RAY_AUTH_TOKEN_PATH": environ["RAY_AUTH_TOKEN_PATH"]}) == "from the file"


def test_no_token_or_an_empty_one_is_not_authorised(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(NotAuthorised, match="no token"):
        read_token({"HOME": str(tmp_path)})
    with pytest.raises(NotAuthorised, match="is empty"):
        read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "empty")})
    with pytest.raises(NotAuthorised, match="cannot read"):
        read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("overrides", "short"),
    [
        ([], None),
        (["launcher.cpus_per_worker=3"], "6 CPUs"),
        (["launcher.gpus_per_worker=1"], "2 GPUs"),
    ],
)
def test_the_resource_that_is_short_is_named(overrides, short):
    cfg = compose(["launcher.num_workers=2", *overrides])
    if short is None:
        require_capacity(cfg, 2, {"CPU": 4.0}, "the cluster")
        return
    with pytest.raises(UsageError, match=f"needs {short}; the cluster has"):
        require_capacity(cfg, 2, {"CPU": 4.0, "GPU": 1.0}, "the cluster")


def test_a_job_runs_on_its_own_cluster():
    sent = job_overrides(["norm=sync", "launcher=ray"], HERE)
    assert sent[0] == "norm=sync"
    assert sent[-2:] == ["launcher=ray", "launcher.address=auto"]
    assert compose(sent).launcher.address == "auto"


def test_a_job_writes_outside_its_throw_away_folder():
    assert files(job_overrides([], HERE), "run") == "~/syncbn-runs/run"
    assert files(job_overrides(["runs_dir=/shared/runs"], HERE), "x") == "/shared/runs/x"
    assert files(job_overrides(["runs_dir=out"], HERE), "x") == "/submitted/from/out/x"


def test_a_jobs_data_are_looked_for_at_an_absolute_path():
    assert "data.root=/submitted/from/mnist" in job_overrides(["data.root=mnist"], HERE)
    assert "data.root='~/mnist'" in job_overrides(["data.root=~/mnist"], HERE)
    assert "data.root=/submitted/from/a,/b" in job_overrides(["data.root=a,/b"], HERE)


QUOTED = {
    "a=b": "'a=b'",
    "two words": "'two words'",
    "it's": r"'it\'s'",
    "a,b": "'a,b'",
    "[x]": "'[x]'",
    r"back\slash": r"'back\slash'",
    "ends\\": r"'ends\\'",
}


@pytest.mark.parametrize("name", QUOTED)
def test_a_path_that_the_grammar_has_quoted_reaches_the_job_as_it_is(name):
    sent = job_overrides([f"runs_dir={QUOTED[name]}"], HERE)
    assert compose(sent).runs_dir == f"/submitted/from/{name}"
    assert files(sent, "run") == f"/submitted/from/{name}/run"


@pytest.mark.parametrize(
    "override",
    ["launcher=local", "launcher.address=head:1", "tracking.uri=http://login0:sesame@host:5000"],
)
def test_settings_that_no_job_may_have_are_refused(override):
    with pytest.raises(UsageError):
        job_overrides([override], HERE)


def test_a_job_records_the_version_of_who_sent_it_whatever_its_cluster_has(monkeypatch):
    monkeypatch.setenv("SYNCBN_VERSION", "9.9")
    assert versions.__wrapped__()["syncbn"] == "9.9"


def test_the_entrypoint_is_safe_from_its_shell():
    nasty = "data.root=/x; rm -rf $HOME"
    assert shlex.split(entrypoint("train", [nasty])) == ["python", "-m", "syncbn", "train", nasty]


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ({"status": "RUNNING"}, 0),
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 3}, 3),
        ({"status": "FAILED", "driver_exit_code": None}, 1),
        ({"status": "STOPPED", "driver_exit_code": None}, 130),
    ],
)
def test_a_jobs_state_has_an_exit_code(job, code):
    assert exit_code_of(job) == code
