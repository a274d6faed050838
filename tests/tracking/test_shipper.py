"""The shipper takes a journal to a service that may be slow, dead or forgetful, and never holds up the run."""

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import HANGS_S, wait_until

from syncbn.tracking import Journal
from syncbn.tracking.shipper import NoShipper, Shipper
from syncbn.tracking.source import RemoteRun, RunGone, RunKey, RunSource


@dataclass
class Service:
    """A tracking service in memory, which fails whenever `broken` says so, and answers while `answers` is set."""

    runs: dict[str, dict] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    broken: bool = False
    fail_after_taking: bool = False
    num_calls: int = 0
    answers: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.answers.set()

    def open(self, key: RunKey, tags):
        self._meet()
        run = self.runs.setdefault(
            key.journal_id, {"tags": dict(tags), "points": {}, "params": {}, "status": "RUNNING"}
        )
        run["parent"] = key.parent_id
        last_steps = {}
        for name, step in run["points"]:
            last_steps[name] = max(step, last_steps.get(name, -1))
        return RemoteRun(
            key.journal_id, last_steps, bool(run["params"]), run["status"] != "RUNNING"
        )

    def send(self, run_id, update):
        self._meet()
        if run_id not in self.runs:
            raise RunGone(run_id)
        run = self.runs[run_id]
        for point in update.points:
            values = run["points"].setdefault((point.key, point.step), {})
            values[point.time_ms] = point.value  # like MLflow: the same point twice is one point
        run["params"] |= update.params
        run["tags"] |= update.tags
        run["status"] = update.status or run["status"]
        if self.fail_after_taking:
            self.fail_after_taking = False
            raise TimeoutError("taken, but the answer was lost")

    def upload(self, run_id, file, folder):
        self._meet()
        self.files.append(f"{folder or ''}/{file.name}")

    def abandon(self, experiment, journal_id):
        self._meet()
        if journal_id in self.runs:
            self.runs[journal_id]["status"] = "KILLED"

    def _meet(self):
        self.num_calls += 1
        self.answers.wait()
        if self.broken:
            raise ConnectionError("refused")

    def values(self) -> dict:
        """Metric and step to value; raises where a step has two points."""
        points = self.run["points"].items()
        return {at: value for at, values in points for (value,) in [values.values()]}

    @property
    def run(self) -> dict:
        (run,) = self.runs.values()
        return run


def source(tmp_path: Path, **more) -> RunSource:
    return RunSource(tmp_path / "run", "exp", **more)


def begin(tmp_path: Path, step: int = 0) -> Journal:
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.begin(step, config={"seed": 1})
    return journal


def train(journal: Journal, first: int, last: int, value: float = 1.0) -> None:
    for step in range(first, last + 1):
        journal.metrics(step, {"loss": value + step})


def test_every_point_arrives_at_its_own_step(tmp_path):
    service = Service()
    shipper = Shipper(lambda: service, "here", [source(tmp_path)], poll_s=0.01)
    journal = begin(tmp_path)
    train(journal, 1, 700)
    journal.event("end", status="finished", summary=None, error=None)
    assert shipper.close() == 0
    assert service.values() == {("loss", step): 1.0 + step for step in range(1, 701)}
    assert (service.run["status"], service.run["params"]) == ("FINISHED", {"seed": "1"})


def test_shipping_twice_changes_nothing(tmp_path):
    service = Service()
    train(begin(tmp_path), 1, 50)
    source(tmp_path).pump(service, final=True)
    before = repr(service.runs)
    source(tmp_path).pump(service, final=True)
    assert repr(service.runs) == before


def test_training_is_not_held_up_by_a_service_that_answers_nothing(tmp_path):
    service = Service()
    service.answers.clear()
    shipper = Shipper(lambda: service, "here", [source(tmp_path)], poll_s=0.01)
    journal = begin(tmp_path)
    try:
        wait_until(lambda: service.num_calls)
        train(journal, 1, 1000)  # comes to its end while the first call is open
        assert service.num_calls == 1
    finally:
        service.answers.set()
    assert shipper.close(HANGS_S) == 0
    assert len(service.run["points"]) == 1000


def test_a_service_that_comes_back_gets_what_it_missed(tmp_path, caplog):
    service = Service()
    shipper = Shipper(lambda: service, "here", [source(tmp_path)], poll_s=0.01)
    journal = begin(tmp_path)
    train(journal, 1, 10)
    wait_until(lambda: service.runs and len(service.run["points"]) == 10)
    service.broken = True
    train(journal, 11, 20)
    wait_until(lambda: shipper.failure is not None)
    assert shipper.num_unsent() == 10
    service.broken = False
    wait_until(lambda: len(service.run["points"]) == 20)
    assert shipper.close() == 0
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        "MLflow at here does not take records",
        "MLflow at here takes records again",
    ]


def test_an_answer_that_was_lost_doubles_nothing(tmp_path):
    service = Service()
    train(begin(tmp_path), 1, 10)
    first = source(tmp_path)
    service.fail_after_taking = True
    with pytest.raises(TimeoutError):
        first.pump(service)
    source(tmp_path).pump(service)
    assert len(service.values()) == 10


def test_close_says_once_what_is_left_and_how_to_send_it(tmp_path, caplog):
    service = Service(broken=True)
    shipper = Shipper(lambda: service, "http://u:pw@host", [source(tmp_path)], poll_s=0.01)
    train(begin(tmp_path), 1, 10)
    wait_until(lambda: shipper.failure is not None)
    caplog.clear()
    assert shipper.close(timeout_s=0.8) == 11
    (record,) = caplog.records
    assert "11 records" in record.getMessage()
    assert f"syncbn ship {tmp_path / 'run'}" in record.getMessage()
    assert "pw" not in record.getMessage()


@pytest.mark.timeout(HANGS_S)
def test_close_tries_a_failing_service_for_a_part_of_its_time_only(tmp_path, monkeypatch):
    monkeypatch.setattr("syncbn.tracking.shipper.CLOSE_FAILING_S", 0.2)
    shipper = Shipper(lambda: Service(broken=True), "here", [source(tmp_path)], poll_s=0.01)
    train(begin(tmp_path), 1, 3)
    assert shipper.close(timeout_s=2 * HANGS_S) == 4


def test_close_does_not_wait_for_a_service_that_hangs(tmp_path):
    over = threading.Event()

    def hang():
        over.wait()
        raise ConnectionError

    shipper = Shipper(hang, "here", [source(tmp_path)], poll_s=0.01)
    train(begin(tmp_path), 1, 3)
    try:
        assert shipper.close(timeout_s=0.3) == 4  # returns while `hang` does not
    finally:
        over.set()


def test_resuming_after_a_crash_sends_no_step_twice(tmp_path):
    service = Service()
    train(begin(tmp_path), 1, 30)
    source(tmp_path).pump(service)
    journal = begin(tmp_path, step=20)
    train(journal, 21, 60)
    source(tmp_path).pump(service, final=True)
    assert service.values() == {("loss", step): 1.0 + step for step in range(1, 61)}


def test_a_journal_begun_anew_is_another_run_and_ends_the_old_one(tmp_path):
    service, followed = Service(), source(tmp_path)
    train(begin(tmp_path), 1, 5)
    followed.pump(service)
    train(begin(tmp_path), 1, 9, value=2.0)
    followed.pump(service)
    old, new = service.runs.values()
    assert (old["status"], len(old["points"])) == ("KILLED", 5)
    assert (new["status"], len(new["points"])) == ("RUNNING", 9)


def test_a_journal_begun_anew_after_a_crash_ends_the_old_run_too(tmp_path):
    service = Service()
    train(begin(tmp_path), 1, 5)
    source(tmp_path).pump(service)
    train(begin(tmp_path), 1, 9)
    source(tmp_path).pump(service)
    assert [run["status"] for run in service.runs.values()] == ["KILLED", "RUNNING"]


def test_a_run_without_an_end_was_killed(tmp_path):
    service = Service()
    train(begin(tmp_path), 1, 5)
    source(tmp_path).pump(service)
    assert service.run["status"] == "RUNNING"
    source(tmp_path).pump(service, final=True)
    assert service.run["status"] == "KILLED"


def test_a_service_that_lost_the_run_gets_all_of_it_again(tmp_path):
    service, followed = Service(), source(tmp_path)
    journal = begin(tmp_path)
    train(journal, 1, 5)
    followed.pump(service)
    service.runs.clear()
    train(journal, 6, 9)
    with pytest.raises(RunGone):
        followed.pump(service)
    followed.pump(service)
    assert len(service.run["points"]) == 9


def test_a_trial_hangs_under_the_launch_that_shows_it(tmp_path):
    service = Service()
    for launch in ("first", "second"):
        Journal(tmp_path / launch / "journal.jsonl").begin(0)
        parent = RunSource(tmp_path / launch, "exp")
        parent.pump(service)
        if not (tmp_path / "run").exists():
            begin(tmp_path)
        source(tmp_path, parent=parent).pump(service)
    parents = [run["parent"] for run in service.runs.values() if run["parent"]]
    assert len(parents) == 1
    assert parents[0].startswith("second@")


def test_artifacts_go_up_at_the_end_only(tmp_path):
    service, followed = (
        Service(),
        source(tmp_path, artifacts=("figures/*.png", "report.md", "none")),
    )
    begin(tmp_path)
    (tmp_path / "run" / "figures").mkdir()
    for name in ("figures/b.png", "figures/a.png", "report.md", "other"):
        (tmp_path / "run" / name).touch()
    followed.pump(service)
    assert service.files == []
    followed.pump(service, final=True)
    assert service.files == ["figures/a.png", "figures/b.png", "/report.md"]


def test_an_outage_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("syncbn.tracking.shipper.FIRST_DELAY_S", 0.001)
    caplog.set_level(logging.INFO)
    service = Service(broken=True)
    shipper = Shipper(lambda: service, "here", [source(tmp_path)], poll_s=0.001)
    begin(tmp_path)
    wait_until(lambda: service.num_calls > 5)
    assert len(caplog.records) == 1
    service.broken = False
    shipper.close()


def test_the_journal_alone_ships_nothing():
    assert NoShipper().close() == 0


def test_a_lost_answer_before_a_resume_leaves_each_step_once(tmp_path):
    service, followed = Service(), source(tmp_path)
    journal = begin(tmp_path)
    followed.pump(service)
    train(journal, 1, 5)
    service.fail_after_taking = True
    with pytest.raises(TimeoutError):
        followed.pump(service)
    time.sleep(0.005)  # so that steps done again have another time
    journal.begin(2, config={"seed": 1})
    train(journal, 3, 7)
    followed.pump(service)
    assert set(service.values()) == {("loss", step) for step in range(1, 8)}


ACTIONS = st.lists(
    st.sampled_from(["train", "train", "pump", "fail", "lose answer", "other process", "resume"]),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_whatever_happens_the_service_ends_with_each_step_once(tmp_path_factory, actions):
    tmp_path = tmp_path_factory.mktemp("any")
    service, followed = Service(), source(tmp_path)
    journal, step = begin(tmp_path), 0
    for action in actions:
        if action == "train":
            train(journal, step + 1, step + 5)
            step += 5
        elif action == "resume" and step:
            step -= min(step - 1, 3)
            journal.begin(step, config={"seed": 1})
        elif action == "other process":
            followed = source(tmp_path)
        else:
            service.broken, service.fail_after_taking = action == "fail", action == "lose answer"
            with contextlib.suppress(ConnectionError, TimeoutError):
                followed.pump(service)
    service = replace(service, broken=False, fail_after_taking=False)
    source(tmp_path).pump(service, final=True)
    assert {at[1] for at in service.values()} >= set(range(1, step + 1))
