"""The probe that trains a textbook network along, and the probe that listens to exchanges."""

import math
from dataclasses import replace

import pytest
import torch
from probe_kit import SOLO, column, split, view_of
from torch import nn

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
from syncbn.errors import UsageError
from syncbn.probes import PROBES
from syncbn.probes.oracle import KINDS, gap
from syncbn.probes.textbook import TextbookBatchNorm
from syncbn.tracking import Untracked
from syncbn.train import train


def _config(folder, arm: str, **optim: object) -> RunConfig:
    return RunConfig(
        runs_dir=str(folder),
        model=ModelConfig(hidden=[16, 16]),
        data=DataConfig(limit=100),
        norm=NormConfig(name=arm, momentum=0.3, eps=1e-3),
        optim=OptimConfig(lr=0.2, **optim),
        train=TrainConfig(steps=30, per_rank_batch=6, precision="float64", virtual=True),
        launcher=LauncherConfig(num_workers=4),
        probe=ProbeConfig(names=["oracle"], every=1),
    )


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4, 2)], ids=["flat", "images"])
def test_the_textbook_says_what_torch_says(shape):
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    ours, theirs = TextbookBatchNorm(3, 1e-3, 0.3).double(), kind(3, 1e-3, 0.3).double()
    for layer in (ours, theirs):
        nn.init.constant_(layer.weight, 1.5)
        nn.init.constant_(layer.bias, -0.5)
    for _ in range(2):
        x, dy = torch.randn(2, *shape, dtype=torch.float64)
        results = []
        for layer in (ours, theirs):
            own = x.clone().requires_grad_()
            (y := layer(own)).backward(dy)
            results.append((y, own.grad, layer.weight.grad, layer.running_mean, layer.running_var))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_gap_is_the_largest_difference_over_the_largest_value_of_a_kind():
    theirs = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([2.0])}
    assert gap({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([1.0])}, theirs) == 0.25
    assert gap(theirs, theirs) == 0
    assert gap({"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([1.0])}, theirs) == math.inf
    assert gap({}, {}) == 0


@pytest.mark.parametrize(
    ("arm", "optim"),
    [
        ("sync", {}),
        ("big_batch", {"weight_decay": 0.01, "clip_norm": 0.5}),
        ("none", {"name": "adamw", "schedule": "constant"}),
    ],
)
def test_an_arm_of_the_whole_batch_stays_with_the_textbook(tmp_path, arm, optim):
    final = train(_config(tmp_path, arm, **optim), SOLO, Untracked()).final
    assert all(final[f"oracle_gap_{kind}"] < 1e-10 for kind in KINDS), final
    assert arm == "none" or final["oracle_gap_weights"] > 0  # two ways to compute, not one


def test_an_arm_of_small_batches_leaves_the_textbook(tmp_path):
    final = train(_config(tmp_path, "local"), SOLO, Untracked()).final
    assert all(final[f"oracle_gap_{kind}"] > 1e-3 for kind in KINDS)


def test_each_look_compares_what_belongs_together(tmp_path):
    seen = {}

    class Seen(Untracked):
        def metrics(self, step, values):
            if "oracle_gap_weights" in values:
                seen[step] = values

    train(_config(tmp_path, "local"), SOLO, Seen())
    assert list(seen) == list(range(31))
    assert seen[0]["oracle_gap_weights"] == 0  # both start alike
    assert seen[1]["oracle_gap_weights"] > 0
    assert set(seen[30]) == {"oracle_gap_buffers", "oracle_gap_weights"}  # no batch any more


@pytest.mark.parametrize("arm", ["group_norm", "ghost"])
def test_an_arm_without_a_textbook_form_is_refused(arm):
    cfg = RunConfig(norm=NormConfig(name=arm))
    with pytest.raises(UsageError, match=f"norm={arm} is not allowed: one of none, local"):
        PROBES["oracle"](view_of(nn.Linear(1, 2), split(column(1, 2)), cfg=cfg))


def test_dropout_is_refused():
    cfg = RunConfig(model=ModelConfig(dropout=0.5))
    with pytest.raises(UsageError, match=r"model.dropout=0.5 is not allowed: 0"):
        PROBES["oracle"](view_of(nn.Linear(1, 2), split(column(1, 2)), cfg=cfg))


def _exchanges(steps: int):
    """The probe after so many steps of 10 ms, in which layers a and b exchange 1 and 3 ms; one step is slow."""
    view = view_of(nn.Linear(1, 2), split(column(1, 2)))
    probe = PROBES["exchange"](view)
    for step in range(steps):
        for _ in range(2):
            probe._told("a", 0, 8, 0.0005)
            probe._told("b", 0, 24, 0.0015)
        slow = 5.0 if step == 25 else 0.010
        probe.watch(replace(view, step=step, lap_s=slow if step else None))
    return probe.conclude(view), probe


def test_the_cost_of_exchanges_is_the_median_over_steps_after_the_warm_up():
    found, _ = _exchanges(60)
    assert found == pytest.approx(
        {
            "step_ms": 10.0,
            "exchange_ms": 4.0,
            "exchange_share": 0.4,
            "exchange_bytes": 64.0,
            "exchange_ms/a": 1.0,
            "exchange_ms/b": 3.0,
            "exchange_bytes/a": 16.0,
            "exchange_bytes/b": 48.0,
        }
    )


def test_too_few_steps_are_not_timed():
    found, _ = _exchanges(20)
    assert math.isnan(found["step_ms"])
    assert found["exchange_bytes"] == 64


def test_the_cost_of_exchanges_adds_up_over_attempts():
    found, probe = _exchanges(60)
    view = view_of(nn.Linear(1, 2), split(column(1, 2)))
    again = PROBES["exchange"](view)
    again.load_state_dict(probe.state_dict())
    assert again.conclude(view) == found
