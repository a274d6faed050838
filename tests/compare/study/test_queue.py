"""What the trials of a study leave behind, whether they end well or not."""

import json
from pathlib import Path

import torch

from syncbn.compare.results import write_results
from syncbn.compare.study.design import trials
from syncbn.compare.study.queue import run_trials
from syncbn.config import Config, DataConfig, ModelConfig, OptimConfig, StudyConfig, TrainConfig
from syncbn.runtime import Solo


def _study(folder, **arms) -> Config:
    return Config(
        name="study",
        runs_dir=str(folder),
        model=ModelConfig(hidden=[8]),
        data=DataConfig(limit=64),
        optim=OptimConfig(momentum=0.0, schedule="constant"),
        train=TrainConfig(steps=12, per_rank_batch=8, agree_every=2),
        study=StudyConfig(seeds=[0, 1], factor=["norm", "optim.lr"], arms=arms),
    )


def _run(cfg: Config) -> dict[str, dict]:
    """Run the trials; every trial's summary."""
    run_trials(trials(cfg), cfg, Solo(torch.device("cpu")))
    folders = [trial.config.folder for trial in trials(cfg)]
    return {f.name: json.loads((f / "summary.json").read_text()) for f in folders}


def test_a_diverged_trial_says_when_it_ended_and_that_its_loss_is_no_number(tmp_path):
    cfg = _study(tmp_path, calm=["norm=none"], wild=["norm=none", "optim.lr=1e30"])
    summaries = _run(cfg)
    wild = summaries["wild-0"]
    assert wild["final"] == {"train_loss": "inf", "test_error": 1.0, "diverged": 1.0}
    assert wild["steps"] == 2
    assert summaries["calm-0"]["steps"] == 12
    assert write_results(cfg)["arms"]["wild"]["steps"] == [
        None,
        None,
    ]  # few steps are no merit here


def test_a_study_that_is_run_again_repeats_nothing(tmp_path):
    cfg = _study(tmp_path, calm=["norm=none"], wild=["norm=none", "optim.lr=1e30"])
    _run(cfg)
    before = _contents(cfg.folder)
    _run(cfg)
    assert _contents(cfg.folder) == before


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
