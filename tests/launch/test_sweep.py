"""A sweep from its settings to its files: failures noted, the rest going on, the same command continuing."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from programs import torchrun

from syncbn.checkpoint import RunLock
from syncbn.cli.launching import make_plan
from syncbn.compare.report.figures.canvas import Picture
from syncbn.compare.study.failure import failure_in, note_failure
from syncbn.compare.study.queue import run_trials
from syncbn.compare.sweep.design import sweep_of
from syncbn.config import config_hash
from syncbn.errors import InfrastructureError, RankFailed, StudyFailed, UsageError
from syncbn.launch.local import launch_sweep
from syncbn.launch.ray_progress import sweep_progress
from syncbn.launch.sweep import conduct_sweep, raise_failures
from syncbn.runtime import Solo
from syncbn.tracking import Journal, read_journal
from syncbn.tracking.study import sources_in
from syncbn.train.record import write_summary
from syncbn.train.summary import RunSummary

TINY = ("debug=tiny", "model.hidden=[4]", "data.limit=64", "launcher.processes=1", "norm=none")


WILD = (
    "optim.momentum=0.0",
    "optim.schedule=constant",
    "train.agree_every=2",
    "model.activation=tanh",
)
"""With which a learning rate of 1e38 soon gives no number."""


def tiny(tmp_path, *overrides):
    return sweep_of([*TINY, f"runs_dir={tmp_path}", *overrides])


@pytest.fixture
def undrawn(monkeypatch):
    """Sweeps without their figure, which takes longer than all else here."""
    picture = Picture("parallel_coordinates", "a title", "a caption", b"PNG")
    monkeypatch.setattr(
        "syncbn.compare.sweep.results.parallel_coordinates", lambda summary: picture
    )


def test_the_whole_of_two_trials(tmp_path, capsys):
    sweep = tiny(tmp_path, "optim.lr=0.01,1e38", "train.steps=12", *WILD)
    summary = launch_sweep(sweep)
    folder = tmp_path / "run-sweep"
    assert summary == json.loads((folder / "summary.json").read_text())
    good, bad = summary["trials"]
    assert (good["settings"], good["status"]) == ({"optim.lr": 0.01}, "finished")
    assert 0 <= good["final"]["test_error"] <= 1
    assert (bad["settings"], bad["status"], bad["exit_code"]) == ({"optim.lr": 1e38}, "diverged", 8)
    assert summary["best"] == good["name"]
    assert "train name=run-sweep-best" in summary["best_command"]
    assert "optim.lr=0.01" in summary["best_command"]
    assert (folder / "figures" / "parallel_coordinates.png").stat().st_size > 10_000
    assert "diverged" in (folder / "report.md").read_text()
    assert "diverged" in capsys.readouterr().out
    with pytest.raises(StudyFailed) as failed:
        raise_failures(summary)
    assert failed.value.exit_code == 8
    assert "1 of 2 trials failed" in str(failed.value)
    _is_kept_by_the_same_command(sweep, good["name"])


def _is_kept_by_the_same_command(sweep, name):
    journal = sweep.config.folder / "trials" / name / "journal.jsonl"
    before = journal.read_bytes()
    launch_sweep(sweep)
    assert journal.read_bytes() == before


def test_a_sweep_on_ray_says_how_far_it_is(tmp_path):
    sweep = tiny(tmp_path, "seed=0,1,2")
    first, second, _ = sweep.trials
    assert sweep_progress(sweep) == "run-sweep: 0 of 3 trials done"
    end(first)
    assert sweep_progress(sweep) == "run-sweep: 1 of 3 trials done"
    note_failure(second.config.folder, ValueError("no luck"))
    assert sweep_progress(sweep) == "run-sweep: 2 of 3 trials done, 1 failed"


def noting(taken):
    """Takes waves by hand: a trial's name is noted, and its summary is written as a run's."""

    def run(wave, _):
        for trial in wave:
            taken.append(trial.name)
            end(trial)

    return run


def end(trial, error=0.5):
    """Leave what a run of the trial leaves at its end."""
    trial.config.folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(trial.config.folder / "journal.jsonl")
    journal.begin(0, config=asdict(trial.config), versions={"torch": "2"}, git="abc")
    final = {"test_error": error, "train_loss": 1.0}
    done = RunSummary(final, trial.config.train.steps, 1.0, 1, config_hash(trial.config))
    journal.event("end", status="finished", summary=done.to_dict(), error=None)
    journal.close()
    write_summary(trial.config.folder, done)


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_fails_on_several_ranks_ends_its_group_and_the_rest_go_on(tmp_path):
    sweep = tiny(tmp_path, "seed=0,1,2", "launcher.num_workers=2", "norm=local")
    groups = []

    def run(wave, size):
        groups.append([trial.seed for trial in wave])
        for trial in wave:
            if trial.seed == 1:
                raise RankFailed("no such sample", 3, "Traceback: no such sample")
            end(trial)

    summary = conduct_sweep(sweep, run)
    assert groups == [[0, 1, 2], [2]]
    states = {t["settings"]["seed"]: (t["status"], t["exit_code"]) for t in summary["trials"]}
    assert states == {0: ("finished", 0), 1: ("failed", 3), 2: ("finished", 0)}
    folder = sweep.trials[1].config.folder
    assert failure_in(folder).error == "no such sample"
    assert "Traceback" in (folder / "error.log").read_text()
    again = []
    assert conduct_sweep(sweep, noting(again))["trials"][-1]["status"] == "finished"
    assert again == [sweep.trials[1].name]


def test_a_trial_of_one_process_that_fails_leaves_its_process_to_the_next(tmp_path, monkeypatch):
    sweep = tiny(tmp_path, "seed=0,1,2")

    def sometimes(cfg, runtime):
        if cfg.seed != 2:
            raise KeyError(cfg.seed)

    monkeypatch.setattr("syncbn.compare.study.queue.recorded_run", sometimes)
    with RunLock(sweep.trials[1].config.folder):  # taken by another process: left to it
        run_trials(sweep.trials, sweep.config, TwoRanks(torch.device("cpu")), go_on=True)
    assert failure_in(sweep.trials[0].config.folder).error == "KeyError: 0"
    assert failure_in(sweep.trials[1].config.folder) is None
    with pytest.raises(KeyError):
        run_trials(sweep.trials, sweep.config, TwoRanks(torch.device("cpu")))


class TwoRanks(Solo):
    """One of two processes that share out trials of one."""

    @property
    def world_size(self):
        return 2

    def solo(self):
        return Solo(self.device)


def test_what_says_nothing_of_one_trial_ends_the_sweep(tmp_path):
    sweep = tiny(tmp_path, "seed=0,1")

    def run(wave, size):
        raise InfrastructureError("rank 1 died")

    with pytest.raises(InfrastructureError):
        conduct_sweep(sweep, run)
    assert not (sweep.config.folder / "summary.json").exists()
    end = list(read_journal(sweep.config.folder / "launch.jsonl"))[-1]
    assert (end["event"], end["status"]) == ("end", "failed")


@pytest.mark.usefixtures("undrawn")
def test_ranks_of_each_number_are_a_group_of_their_own(tmp_path):
    sweep = tiny(tmp_path, "launcher.num_workers=1,2,3", "norm=local", "launcher.processes=4")
    sizes = []

    def run(wave, size):
        sizes.append((size, len(wave)))
        noting([])(wave, size)

    conduct_sweep(sweep, run)
    assert sizes == [(2, 2), (3, 1)]
    assert sweep.most_processes == 3


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_does_not_write_over_a_run_or_over_trials_of_other_settings(tmp_path):
    sweep = tiny(tmp_path, "seed=0,1", "name=mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "journal.jsonl").touch()
    with pytest.raises(UsageError, match="holds a run"):
        conduct_sweep(sweep, noting([]))
    (tmp_path / "mine" / "journal.jsonl").unlink()
    conduct_sweep(sweep, noting([]))
    with pytest.raises(UsageError, match="give it another name"):
        conduct_sweep(tiny(tmp_path, "seed=0,1", "name=mine", "optim.lr=0.3"), noting([]))


@pytest.mark.usefixtures("undrawn")
def test_what_goes_to_mlflow_is_a_run_and_a_child_a_trial_tagged_with_its_settings(tmp_path):
    sweep = tiny(tmp_path, "optim.lr=0.1,0.2", "seed=4", "train.steps=1")
    conduct_sweep(sweep, noting([]))
    trials = sweep.config.folder / "trials"
    shutil.copytree(trials / "lr_0.1-4", trials / "lr_0.05-4")  # of an earlier grid
    service = Service()
    for source in sources_in(sweep.config.folder):
        source.pump(service, final=True)
    parent, *children = service.opened
    assert parent == (
        "run-sweep",
        None,
        {"sweep": "run-sweep", "mlflow.source.name": "syncbn sweep"},
    )
    assert [(name, of) for name, of, _ in children] == [
        ("lr_0.1-4", "run-sweep"),
        ("lr_0.2-4", "run-sweep"),
    ]
    assert children[1][2]["sweep.optim.lr"] == "0.2"
    assert children[1][2]["overrides"] == "optim.lr=0.2"
    assert service.said["run-sweep"]["best"].startswith("optim.lr=0.")
    assert "figures/parallel_coordinates.png" in service.files


class Service:
    """A tracking service that remembers what it was told."""

    def __init__(self):
        self.opened, self.said, self.files = [], {}, []

    def open(self, key, tags):
        from syncbn.tracking.source import RemoteRun

        self.opened.append((key.name, key.parent_id, dict(tags)))
        return RemoteRun(key.name)

    def send(self, run_id, update):
        self.said.setdefault(run_id, {}).update(update.tags)

    def upload(self, run_id, file, folder):
        self.files.append(f"{folder}/{file.name}")

    def abandon(self, experiment, journal_id):
        pass


def test_a_plan_of_a_sweep_lists_its_trials_and_fills_the_largest_group():
    plan = make_plan("sweep", ["seed=0,1", "launcher.num_workers=1,4", "norm=local"], {})
    assert plan.command == "syncbn sweep seed=0,1 launcher.num_workers=1,4 norm=local"
    assert plan.num_ranks == 4
    assert plan.to_dict()["trials"] == [
        "num_workers_1-0",
        "num_workers_4-0",
        "num_workers_1-1",
        "num_workers_4-1",
    ]


def test_a_sweep_takes_no_study_and_starts_its_own_ranks():
    with pytest.raises(UsageError, match="takes no study"):
        make_plan("sweep", ["study=demo", "seed=0,1"], {})
    with pytest.raises(UsageError, match="not with torchrun"):
        make_plan("sweep", ["seed=0,1"], torchrun())
