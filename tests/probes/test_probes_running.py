"""Probes beside a training run: they leave no trace, look when due, and survive an interruption."""

import json
import random
import signal
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from probe_kit import SOLO, column, split, view_of
from torch import nn

from syncbn.checkpoint import load_latest
from syncbn.config import PROBES as NAMES
from syncbn.config import (
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from syncbn.errors import Stopped, UsageError
from syncbn.probes import PROBES, Probe, Probes, running
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import loop, recorded_run

TIMED = {"step_ms", "exchange_ms", "exchange_share"}


def _config(folder, names=NAMES, every=4, **changes: object) -> RunConfig:
    cfg = RunConfig(
        runs_dir=str(folder),
        model=ModelConfig(hidden=[16, 16]),
        data=DataConfig(limit=120),
        norm=NormConfig(name="local"),
        optim=OptimConfig(clip_norm=1.0),
        train=TrainConfig(
            steps=25, per_rank_batch=4, virtual=True, shares="by_class", checkpoint_every=6
        ),
        launcher=LauncherConfig(num_workers=4),
        probe=ProbeConfig(names=list(names), every=every, first=4, samples=50),
    )
    return replace(cfg, **changes)


def _points(cfg: RunConfig) -> dict[str, dict[int, float]]:
    """Everything in the journal by metric and step, but losses, rates and evaluations."""
    found: dict[str, dict[int, float]] = {}
    for record in read_journal(cfg.folder / "journal.jsonl"):
        for metric, value in record.get("metrics", {}).items():
            found.setdefault(metric, {})[record["step"]] = value
    return found


def _final(summary) -> str:
    """Finals as text, in which NaN equals NaN, without those that are times."""
    return json.dumps({k: v for k, v in summary.final.items() if k not in TIMED}, sort_keys=True)


def test_every_name_of_the_schema_has_a_probe():
    assert tuple(PROBES) == NAMES
    assert all(issubclass(probe, Probe) and probe.__doc__ for probe in PROBES.values())


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (NAMES, ModelConfig(hidden=[16, 16])),
        ([n for n in NAMES if n != "oracle"], ModelConfig(hidden=[16, 16], dropout=0.3)),
        ([n for n in NAMES if n != "oracle"], ModelConfig(name="cnn", width=4, dropout=0.3)),
    ],
    ids=["all", "dropout", "convolutions"],
)
def test_training_with_probes_has_the_bits_of_training_without(tmp_path, names, model):
    ends = {}
    for name, probes in (("with", names), ("without", [])):
        cfg = _config(tmp_path / name, probes, every=1, model=model)
        cfg.train.steps = 12
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global one, which training saves
        recorded_run(cfg, SOLO)
        ends[name] = load_latest(cfg.folder / "checkpoints"), _points(cfg)
    (ours, our_points), (theirs, their_points) = ends.values()
    assert ours.model_state.keys() == theirs.model_state.keys()
    for name, value in ours.model_state.items():
        assert torch.equal(value, theirs.model_state[name]), name
    for index, state in ours.optimizer_state["state"].items():
        momentum = theirs.optimizer_state["state"][index]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], momentum)
    assert our_points["train_loss"] == their_points["train_loss"]
    assert our_points["test_error"] == their_points["test_error"]
    assert ours.meta.rng == theirs.meta.rng, "random numbers were drawn"


def test_looks_are_at_the_start_at_due_steps_and_at_the_end(tmp_path):
    cfg = _config(tmp_path, ["quantiles", "gradients"], every=10)
    recorded_run(cfg, SOLO)
    points = _points(cfg)
    assert list(points["quantile/50"]) == [0, 10, 20, 25]
    assert list(points["grad_norm/1"]) == [0, 10, 20]  # the last look has no batch
    rare = _config(tmp_path / "rare", ["quantiles"], every=0)
    recorded_run(rare, SOLO)
    assert list(_points(rare)["quantile/50"]) == [0, 25]


def test_finals_join_those_of_the_trial(tmp_path):
    summary = recorded_run(_config(tmp_path), SOLO)
    expected = {"test_error", "train_loss", "quantile_range", "shift_slope", "precise_gap"}
    expected |= {"loss_range", "leak_gap", "oracle_gap_weights", "step_ms"}
    assert expected <= summary.final.keys()
    assert summary.final["test_error_running"] == summary.final["test_error"]


@pytest.mark.parametrize("at", [6, 7, 13, 25])
def test_an_interrupted_run_ends_with_the_numbers_of_one_that_was_not(tmp_path, at):
    straight, cfg = (_config(tmp_path / name) for name in ("straight", "resumed"))
    for one in (straight, cfg):
        one.train.agree_every = 1
    whole = recorded_run(straight, SOLO)

    def backward(state, *batch):
        if state.step == at - 1:
            signal.raise_signal(signal.SIGTERM)
        return real_backward(state, *batch)

    real_backward = loop._backward
    with patch.object(loop, "_backward", backward), pytest.raises(Stopped):
        recorded_run(cfg, SOLO)
    assert load_latest(cfg.folder / "checkpoints").meta.step == at
    assert _final(recorded_run(cfg, SOLO)) == _final(whole)
    assert _points(cfg) == _points(straight)


def test_a_run_killed_between_its_last_save_and_its_summary_concludes_the_same(tmp_path):
    cfg = _config(tmp_path)
    whole = recorded_run(cfg, SOLO)
    before = _points(cfg)
    (cfg.folder / "summary.json").unlink()
    assert _final(recorded_run(cfg, SOLO)) == _final(whole)
    assert _points(cfg) == before


def test_without_probes_nothing_is_made_asked_or_saved(tmp_path):
    view = view_of(nn.Linear(1, 2), split(column(1, 2)))
    assert not Probes(view)
    assert Probes(view).state_dict() == {}
    with patch.object(Probes, "before_step"), patch.object(Probes, "after_last"):
        recorded_run(_config(tmp_path, []), SOLO)
        assert not Probes.before_step.called
        assert not Probes.after_last.called


def test_probes_are_closed_however_a_run_ends(tmp_path):
    closed = []

    class Bad(Probe):
        def close(self):
            closed.append(self)

        def look(self, view):
            raise OSError("disk gone")

    with patch.dict(running.PROBES, {"leak": Bad}), pytest.raises(OSError, match="disk gone"):
        recorded_run(_config(tmp_path, ["leak"]), SOLO)
    assert len(closed) == 1


def test_what_a_probe_leaves_behind_is_put_right(tmp_path):
    class Rude(Probe):
        def look(self, view):
            view.model.eval()
            for buffer in view.model.buffers():
                buffer.zero_()
            torch.rand(1)
            return {}

    cfgs = [_config(tmp_path / name, names) for name, names in (("a", ["leak"]), ("b", []))]
    with patch.dict(running.PROBES, {"leak": Rude}):
        one, other = (recorded_run(cfg, SOLO).final for cfg in cfgs)
    assert one == other


class ThreeRanks(Solo):
    world_size = 3


@pytest.mark.parametrize("name", ["smoothness", "population", "leak"])
def test_probes_that_run_the_network_aside_refuse_several_real_ranks(name):
    view = view_of(nn.Linear(1, 2), split(column(1, 2)))
    with pytest.raises(UsageError, match=f"probe {name} needs one process, and 3 ranks train"):
        PROBES[name](replace(view, runtime=ThreeRanks(torch.device("cpu"))))


@pytest.mark.parametrize("name", ["population", "leak"])
def test_probes_that_count_wrong_classes_refuse_other_tasks(name):
    view = view_of(nn.Linear(1, 2), split(column(1, 2)))
    cfg = replace(view.cfg, task=replace(view.cfg.task, name="regression"))
    with pytest.raises(UsageError, match=f"probe {name} counts wrong classes: .* task=regression"):
        PROBES[name](replace(view, cfg=cfg))


def test_ranks_of_about_one_class_do_worse_out_of_training_mode_and_synchronising_cures_it(
    tmp_path,
):
    gaps = {}
    for arm in ("local", "sync"):
        cfg = _config(tmp_path / arm, ["leak"], norm=NormConfig(name=arm))
        cfg.data.limit, cfg.train.steps, cfg.train.per_rank_batch = None, 150, 6
        cfg.launcher.num_workers = 10  # as many as classes: about one a rank
        gaps[arm] = recorded_run(cfg, SOLO).final["leak_gap"]
    assert gaps["local"] > 0.1
    assert abs(gaps["sync"]) < 0.05
