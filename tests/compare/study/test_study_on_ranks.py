"""The trials of a study on ranks: all ranks are in the same trial, whatever happens to one of them."""

import json
import os
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from syncbn.compare.study.design import trials
from syncbn.compare.study.queue import run_trials
from syncbn.config import (
    Config,
    DataConfig,
    LauncherConfig,
    ModelConfig,
    StudyConfig,
    TrackingConfig,
    TrainConfig,
)
from syncbn.errors import Stopped
from syncbn.runtime import TorchrunRuntime
from syncbn.tracking import read_journal
from syncbn.train import loop
from syncbn.train.saving import Saving

pytestmark = pytest.mark.untraced


def _study(folder: Path, world_size: int, arms: dict[str, list[str]]) -> Config:
    return Config(
        name="study",
        runs_dir=str(folder),
        model=ModelConfig(hidden=[8]),
        data=DataConfig(limit=64),
        train=TrainConfig(steps=6, per_rank_batch=4, agree_every=2),
        launcher=LauncherConfig(num_workers=world_size),
        tracking=TrackingConfig(name="journal"),
        study=StudyConfig(seeds=[0], arms=arms),
    )


def _run(cfg: Config) -> None:
    run_trials(trials(cfg), cfg, TorchrunRuntime(torch.device("cpu")))


def _summaries(cfg: Config) -> dict[str, dict]:
    dist.barrier()  # rank 0 writes them
    folders = [trial.config.folder for trial in trials(cfg)]
    return {
        folder.name: json.loads((folder / "summary.json").read_text())
        for folder in folders
        if (folder / "summary.json").is_file()
    }


@pytest.mark.world_size(2)
def test_a_signal_after_a_trials_last_agreement_stops_the_study_before_the_next(
    world_size, tmp_path
):
    cfg = _study(tmp_path, world_size, {"local": ["norm=local"], "sync": ["norm=sync"]})

    def save_and_be_told(self):
        real_save(self)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    real_save = Saving.finish
    with patch.object(Saving, "finish", save_and_be_told), pytest.raises(Stopped) as stopped:
        _run(cfg)
    assert stopped.value.exit_code == 143
    assert set(_summaries(cfg)) == {"local-0"}
    _run(cfg)
    assert set(_summaries(cfg)) == {"local-0", "sync-0"}


@pytest.mark.world_size(4)
def test_input_that_is_not_finite_in_one_group_ends_the_trial_on_all_ranks(world_size, tmp_path):
    groups = ["norm=sync_group", "norm.group_size=2"]
    cfg = _study(tmp_path, world_size, {"groups": groups, "sync": ["norm=sync"]})

    def backward(state, global_batch, x, y):
        if state.cfg.norm.name == "sync_group" and state.step == 3 and dist.get_rank() == 1:
            x = x / 0
        return real_backward(state, global_batch, x, y)

    real_backward = loop._backward
    with patch.object(loop, "_backward", backward):
        _run(cfg)
    summaries = _summaries(cfg)
    assert summaries["groups-0"]["final"]["diverged"] == 1
    assert "diverged" not in summaries["sync-0"]["final"]
    if dist.get_rank() == 0:
        *_, end = read_journal(cfg.folder / "trials" / "groups-0" / "journal.jsonl")
        assert "loss of step 4 is not finite on rank 0, 1:" in end["error"]


@pytest.mark.world_size(2)
def test_synchronised_runs_of_one_process_share_a_pool_and_wait_for_nobody(world_size, tmp_path):
    arms = {"sync": ["norm=sync"], "group": ["norm=sync_group", "norm.group_size=1"]}
    cfg = _study(tmp_path, 1, arms | {"local": ["norm=local"]})
    _run(cfg)
    assert set(_summaries(cfg)) == {"sync-0", "group-0", "local-0"}
    errors = {name: found["final"]["test_loss"] for name, found in _summaries(cfg).items()}
    assert errors["sync-0"] == pytest.approx(errors["local-0"], rel=1e-5)
