"""What stands in MLflow after a study and after a run, and what becomes of it when MLflow fails."""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from programs import HANGS_S, SUPPORT, free_port, wait_until
from study_files import (
    STEPS,
    begin,
    end,
    run_config,
    study_config,
    write_results,
    write_trial,
    write_trials,
)

from syncbn.config import TrackingConfig
from syncbn.errors import ServiceUnreachable, UsageError
from syncbn.tracking.service import ENVIRONMENT, store_uri
from syncbn.tracking.shipper import NoShipper
from syncbn.tracking.study import StudyTracker, ship, start_shipping

pytest.importorskip("mlflow", reason="the extra syncbn[service] is not installed")


def client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs_of(uri: str, experiment: str = "demo") -> dict:
    """Run name to run, of all runs in an experiment."""
    mlflow = client(uri)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "two runs of one name"
    return {run.info.run_name: run for run in found}


def points(uri: str, run, key: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in client(uri).get_metric_history(run.info.run_id, key)]


def launch(cfg, folders, status: str = "finished") -> None:
    tracker = StudyTracker(cfg)
    tracker.follow(folders)
    write_results(cfg)
    assert tracker.finish(status, timeout_s=120) == 0


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """A store without runs: making one takes MLflow two seconds, copying one nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def runs_dir(tmp_path, empty_store) -> Path:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The config of a study of which everything was shipped to the default store."""
    cfg = study_config(tmp_path_factory.mktemp("study") / "runs")
    launch(cfg, write_trials(cfg))
    return cfg


def test_a_study_is_one_experiment_with_a_launch_and_its_trials(study):
    runs = runs_of(store_uri(study.runs_dir))
    assert set(runs) == {"demo", "local-0", "local-1", "sync-0", "sync-1"}
    parent = runs.pop("demo").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_trial_says_what_it_was(study):
    run = runs_of(store_uri(study.runs_dir))["sync-1"]
    tags = run.data.tags
    assert (tags["arm"], tags["seed"], tags["git"], tags["attempt"]) == (
        "sync",
        "1",
        "0123abc",
        "1",
    )
    assert len(tags["config_hash"]) == 12
    assert run.data.params["train.per_rank_batch"] == "32"


def test_points_stand_at_their_true_steps_and_times(study):
    uri = store_uri(study.runs_dir)
    run = runs_of(uri)["sync-0"]
    assert points(uri, run, "train_loss") == [(step, 1 / step) for step in STEPS]
    assert [step for step, _ in points(uri, run, "test_error")] == [100, 200, 300, 400, 500, 600]
    last = client(uri).get_metric_history(run.info.run_id, "seconds")[-1]
    assert (last.value, last.step) == (1.5, 600)
    assert abs(run.info.end_time - last.timestamp) <= 1


def test_the_launch_carries_verdicts_figures_and_report(study):
    uri = store_uri(study.runs_dir)
    run = runs_of(uri)["demo"]
    assert run.data.tags["claim.sync_beats_local"] == "REPRODUCED"
    assert "| sync_beats_local | REPRODUCED |" in run.data.tags["mlflow.note.content"]
    assert "figures/x.png" not in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["test_error/sync"] == pytest.approx(0.065)
    assert run.data.metrics["effect/sync_beats_local"] == -0.29
    names = {file.path for file in client(uri).list_artifacts(run.info.run_id)}
    assert names == {"figures", "report.html", "report.md", "summary.json", "metrics.parquet"}
    (figure,) = client(uri).list_artifacts(run.info.run_id, "figures")
    assert figure.path == "figures/convergence.png"
    assert run.info.artifact_uri.startswith(str(Path(study.runs_dir).resolve() / "mlartifacts"))


def test_shipping_again_changes_nothing(study):
    uri = store_uri(study.runs_dir)

    def everything():
        histories = [
            points(uri, run, key) for run in runs_of(uri).values() for key in run.data.metrics
        ]
        return [run.to_dictionary() for run in runs_of(uri).values()], histories

    before = everything()
    assert ship(study.folder) == 5
    assert ship(study.folder / "trials" / "sync-0") == 5
    assert everything() == before


def test_a_later_launch_takes_over_the_finished_trials(runs_dir):
    cfg = study_config(runs_dir)
    folders = write_trials(cfg)
    first = StudyTracker(cfg)
    first.follow(folders[:2])
    wait_until(lambda: first._shipper.num_unsent() == 0, 120)
    launch(cfg, folders)  # the first launch was killed: it never said that it finished
    uri = store_uri(cfg.runs_dir)
    mlflow = client(uri)
    found = mlflow.search_runs([mlflow.get_experiment_by_name("demo").experiment_id])
    old, new = sorted(
        (run for run in found if run.info.run_name == "demo"), key=lambda r: r.info.start_time
    )
    assert (old.info.status, new.info.status) == ("KILLED", "FINISHED")
    trials = [run for run in found if run.info.run_name != "demo"]
    assert len(trials) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {new.info.run_id}
    first._shipper.close(0)


def test_runs_end_in_their_true_state(runs_dir):
    cfg = study_config(runs_dir)
    trials = cfg.folder / "trials"
    folders = [
        write_trial(run_config(trials, "sync-0"), status="failed"),
        write_trial(run_config(trials, "sync-1"), status="stopped"),
        trials / "never-begun-0",
    ]
    begin(run_config(trials, "killed-0")).close()
    launch(cfg, [*folders, trials / "killed-0"], status="failed")
    states = {name: run.info.status for name, run in runs_of(store_uri(cfg.runs_dir)).items()}
    assert states == {
        "demo": "FAILED",
        "sync-0": "FAILED",
        "sync-1": "KILLED",
        "killed-0": "KILLED",
    }


def test_a_single_run_resumed_is_one_run_with_each_step_once(runs_dir):
    cfg = run_config(runs_dir)
    for first, last in ((0, 300), (200, 400)):
        journal = begin(cfg, step=first)
        shipper = start_shipping(cfg, cfg.folder / "journal.jsonl")
        for step in range(first + 10, last + 1, 10):
            journal.metrics(step, {"train_loss": 1 / step, "odd$name": math.nan})
        if last == 400:
            end(journal, cfg)
        assert shipper.close(120) == 0
    uri = store_uri(cfg.runs_dir)
    run = runs_of(uri, "runs")["run"]
    assert points(uri, run, "train_loss") == [(step, 1 / step) for step in range(10, 401, 10)]
    assert math.isnan(run.data.metrics["odd_name"])
    assert (run.info.status, run.data.tags["attempt"], run.data.tags["arm"]) == (
        "FINISHED",
        "2",
        "sync",
    )
    assert [file.path for file in client(uri).list_artifacts(run.info.run_id)] == ["summary.json"]


def test_secrets_and_long_values_do_not_get_through(runs_dir):
    cfg = run_config(runs_dir)
    cfg.data.root = "x" * 7000
    cfg.tracking.uri = "http://login0:pa55@host:1/"
    write_trial(cfg)
    ship(cfg.folder, store_uri(cfg.runs_dir))
    run = runs_of(store_uri(cfg.runs_dir), "runs")["run"]
    assert run.data.params["data.root"].endswith("(cut, 7000 characters)")
    assert "pa55" not in str(run.to_dictionary())


def test_a_recorded_uri_without_its_password_is_asked_for(tmp_path):
    cfg = run_config(tmp_path, uri="http://***@host:1/")
    write_trial(cfg)
    with pytest.raises(UsageError, match="give the whole URI"):
        ship(cfg.folder)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path} holds no run"):
        ship(tmp_path)


def test_the_journal_alone_starts_nothing(tmp_path):
    cfg = study_config(tmp_path / "runs")
    cfg.tracking = TrackingConfig(name="journal")
    assert isinstance(start_shipping(cfg, tmp_path / "journal.jsonl"), NoShipper)
    tracker = StudyTracker(cfg)
    tracker.follow(write_trials(cfg))
    assert tracker.finish() == 0
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    write_results(cfg)
    assert ship(cfg.folder) == 5


@pytest.mark.parametrize("status", [500, 401])
def test_a_server_that_answers_with_errors_loses_nothing_of_the_run(runs_dir, status):
    with answering(status) as uri:
        cfg = run_config(runs_dir, uri=uri)
        journal = begin(cfg)
        shipper = start_shipping(cfg, cfg.folder / "journal.jsonl")
        wait_until(lambda: shipper.failure is not None)
        for step in range(1, 501):
            journal.metrics(step, {"train_loss": 1 / step})
        end(journal, cfg)
        assert shipper.close(1) == journal_length(cfg)
    ship(cfg.folder, store_uri(cfg.runs_dir))
    run = runs_of(store_uri(cfg.runs_dir), "runs")["run"]
    assert len(points(store_uri(cfg.runs_dir), run, "train_loss")) == 500


@pytest.mark.slow
def test_a_server_killed_on_the_way_gets_everything_when_it_is_back(runs_dir):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    cfg = run_config(runs_dir, uri=uri)
    journal = begin(cfg)
    with serving(runs_dir, port):
        shipper = start_shipping(cfg, cfg.folder / "journal.jsonl")
        for step in range(1, 101):
            journal.metrics(step, {"train_loss": 1 / step})
        wait_until(lambda: shipper.num_unsent() == 0)
    journal.metrics(101, {"train_loss": 1 / 101})
    wait_until(lambda: shipper.failure is not None)
    with pytest.raises(ServiceUnreachable):
        ship(cfg.folder)
    for step in range(102, 201):
        journal.metrics(step, {"train_loss": 1 / step})
    end(journal, cfg)
    with serving(runs_dir, port):
        wait_until(lambda: shipper.num_unsent() == 0)
        assert shipper.close(HANGS_S) == 0
        run = runs_of(uri, "runs")["run"]
        assert points(uri, run, "train_loss") == [(step, 1 / step) for step in range(1, 201)]
        assert run.info.status == "FINISHED"
        assert [file.path for file in client(uri).list_artifacts(run.info.run_id)] == [
            "summary.json"
        ]


def test_a_process_ends_at_once_beside_a_server_that_hangs(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from study_files import begin, run_config; from syncbn.tracking.study import start_shipping\n"
        "cfg = run_config(Path(sys.argv[2]), uri=sys.argv[3]); begin(cfg)\n"
        "shipper = start_shipping(cfg, cfg.folder / 'journal.jsonl'); print(shipper.close(0.5))\n"
    )
    patient = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(4 * HANGS_S)}  # its calls hang
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", program, str(SUPPORT), str(tmp_path), uri]
        result = subprocess.run(
            command, env=patient, capture_output=True, text=True, timeout=HANGS_S
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1"]
    assert result.stderr.count("syncbn ship") == 1


def journal_length(cfg) -> int:
    return (cfg.folder / "journal.jsonl").read_text().count("\n")


@contextmanager
def answering(status: int):
    """A server that answers everything with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@contextmanager
def serving(folder: Path, port: int):
    """A real MLflow server over the store in `folder`, killed at the end with all it started."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "mlartifacts")]
    settings = os.environ | ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(
            command, env=settings, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
