"""What a job takes along: the project's folder, the checkout, or the package alone; and never too much."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from programs import ROOT, SYNCBN, complaint

from syncbn.compose import compose, config_folder
from syncbn.errors import UsageError
from syncbn.launch import ray_upload
from syncbn.launch.ray_dashboard import Dashboard
from syncbn.launch.ray_jobs import send
from syncbn.launch.ray_upload import Upload, refuse_large, runtime_env, sent_files, upload_of

PACKAGE = Path(ray_upload.__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, size=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def test_a_project_is_sent_with_the_package(here):
    (here / "conf" / "study").mkdir(parents=True)
    upload = upload_of([], here)
    assert (upload.working_dir, upload.package) == (here, PACKAGE)


def test_a_folder_whose_modules_are_extensions_is_a_project(here):
    assert upload_of(["extensions=[mine]"], here).working_dir == here


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkout_is_sent_where_there_is_no_project(here, monkeypatch, inside):
    folder = PACKAGE.parent if inside else here
    monkeypatch.chdir(folder)
    assert upload_of([], folder).to_dict() == {
        "working_dir": str(PACKAGE.parent),
        "py_modules": [],
    }


def test_the_package_alone_is_sent_where_the_configs_are_not_the_checkouts(here, monkeypatch):
    monkeypatch.setenv("SYNCBN_CONF", str(here / "other"))
    assert upload_of([], here).to_dict() == {"working_dir": None, "py_modules": [str(PACKAGE)]}


def test_the_package_that_is_sent_has_its_configs_inside_and_works_by_itself(here):
    (here / "conf").mkdir()
    with runtime_env(upload_of([], here)) as env:
        assert env["working_dir"] == str(here)
        [sent] = map(Path, env["py_modules"])
        assert (sent / "conf" / "main.yaml").is_file()
        assert not list(sent.rglob("__pycache__"))
        environ = os.environ | {"PYTHONPATH": str(sent.parent)}
        command = [sys.executable, "-m", "syncbn", "train", "norm=local", "--dry-run"]
        done = subprocess.run(command, cwd=here, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not sent.exists()


def test_the_configs_that_are_sent_are_those_in_use(here, monkeypatch):
    write(here / "other" / "main.yaml")
    monkeypatch.setenv("SYNCBN_CONF", str(here / "other"))
    with runtime_env(upload_of([], here)) as env:
        assert not list(Path(env["working_dir"]).iterdir())
        configs = Path(env["py_modules"][0]) / "conf"
        assert [path.name for path in configs.iterdir()] == ["main.yaml"]


def test_what_is_ignored_is_not_sent_as_ray_does_it(here, monkeypatch):
    for name in ("mine.py", "runs/a", "big.bin", "sub/big.bin", "sub/keep", ".venv/x", ".git/x"):
        write(here / name)
    (here / ".gitignore").write_text("/runs/\n")
    (here / ".rayignore").write_text("*.bin\n")
    (here / "sub" / ".gitignore").write_text("nothing\n")
    names = {path.relative_to(here).as_posix() for path in sent_files(here)}
    assert names == {"mine.py", ".gitignore", ".rayignore", "sub/keep", "sub/.gitignore"}
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert here / "runs" / "a" in sent_files(here)


def test_a_large_folder_is_refused_with_its_largest_files_and_the_way_out(here, monkeypatch):
    monkeypatch.setattr(ray_upload, "MOST_BYTES", 10 * 2**20)
    write(here / "runs" / "checkpoint", 8 * 2**20)
    write(here / "images.zip", 3 * 2**20)
    write(here / "conf" / "config.yaml")
    said = (
        r"has 11 MB to send with the job, at most 10 MB are allowed: .*\.rayignore; "
        r"the largest are runs/checkpoint \(8 MB\), images\.zip \(3 MB\)"
    )
    with pytest.raises(UsageError, match=said):
        upload_of([], here)
    (here / ".rayignore").write_text("images.zip\n")
    refuse_large(here)


def test_a_plan_says_what_would_be_sent_and_the_command(bench):
    (bench.folder / "conf").mkdir()
    result = bench.run(*SYNCBN, "submit", "train", "seed=1", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["working_dir"] == str(bench.folder)
    assert [Path(path).name for path in plan["py_modules"]] == ["syncbn"]
    assert plan["command"].startswith("python -m syncbn train seed=1 ")


def test_a_large_project_is_2_before_anything_is_asked_of_the_cluster(bench):
    (bench.folder / "conf").mkdir()
    with (bench.folder / "data.bin").open("wb") as file:
        file.truncate(60 * 2**20)
    result = bench.run(*SYNCBN, "submit", "train", "--address", "http://127.0.0.1:1")
    assert result.returncode == 2
    assert "data.bin (60 MB)" in complaint(result)


def test_our_checkout_is_small():
    assert config_folder() == ROOT / "conf"
    assert sum(sent_files(ROOT).values()) < 3 * 2**20


class Small(BaseHTTPRequestHandler):
    """A dashboard behind a proxy that takes no large requests."""

    def do_GET(self):
        known = self.path == "/api/version"
        self._answer(
            200 if known else 404, b'{"version": "4", "ray_version": "2", "ray_commit": ""}'
        )

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(413, b"Request Entity Too Large")

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


def test_what_is_too_large_for_a_cluster_or_its_proxy_is_named_with_the_way_out(here, monkeypatch):
    monkeypatch.setattr(Dashboard, "python", lambda self: "python")
    (here / "conf").mkdir()
    write(here / "weights.bin", 4 * 2**20)
    with ThreadingHTTPServer(("127.0.0.1", 0), Small) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dashboard = Dashboard(f"http://127.0.0.1:{server.server_port}", "token")
        said = r"does not take .*HTTP 413.* has 4 MB: .*\.rayignore; the largest are weights\.bin \(4 MB\)"
        with pytest.raises(UsageError, match=said):
            send(dashboard, "train", compose([]), ["runs_dir=r"], Upload(here, None))
        server.shutdown()


def test_large_configs_of_ones_own_are_refused_too(here, monkeypatch):
    monkeypatch.setattr(ray_upload, "MOST_BYTES", 2**20)
    write(here / "other" / "data.bin", 2 * 2**20)
    monkeypatch.setenv("SYNCBN_CONF", str(here / "other"))
    with pytest.raises(UsageError, match=r"other has 2 MB .* largest are data\.bin"):
        upload_of([], here)
