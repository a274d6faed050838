"""The gate: one process that stands for W ranks trains as W real ranks do, in every arm.

Only because of these tests may virtual runs speak for real ones. Both go through the same `train`, in float64, for 20
steps with momentum; weights, running statistics and what was measured must then be equal but for rounding.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close

from syncbn.checkpoint import load_latest
from syncbn.config import (
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from syncbn.runtime import Solo, TorchrunRuntime
from syncbn.tracking import Untracked, read_journal
from syncbn.train import recorded_run, train

pytestmark = pytest.mark.untraced
CPU = torch.device("cpu")
BOUND = 1e-10
MLP = {"name": "mlp", "hidden": [12, 10]}
CNN = {"name": "cnn", "width": 4}
ARMS = ["local", "local_avg", "sync", "sync_group", "ghost", "none", "group_norm"]
DIFFERING = ["local", "local_avg", "sync", "sync_group", "ghost"]


def _config(
    folder: Path,
    world_size: int,
    arm: str,
    model: dict,
    data: dict | None = None,
    **options: object,
) -> RunConfig:
    train_options = {"steps": 20, "per_rank_batch": 4, "precision": "float64", "eval_every": 7}
    return RunConfig(
        name=arm,
        runs_dir=str(folder),
        model=ModelConfig(**model),
        data=DataConfig(**({"limit": 80} | (data or {}))),
        norm=NormConfig(name=arm, group_size=world_size // 2, num_groups=2, ghost_size=2),
        optim=OptimConfig(lr=0.05, weight_decay=1e-3, clip_norm=1.0),
        train=TrainConfig(**(train_options | options)),
        launcher=LauncherConfig(num_workers=world_size),
    )


def _virtual(cfg: RunConfig) -> RunConfig:
    return replace(cfg, name=f"virtual_{cfg.name}", train=replace(cfg.train, virtual=True))


def _state(cfg: RunConfig) -> dict[str, torch.Tensor]:
    return load_latest(cfg.folder / "checkpoints").model_state


def _curve(cfg: RunConfig, metric: str) -> torch.Tensor:
    records = read_journal(cfg.folder / "journal.jsonl")
    return torch.tensor(
        [r["metrics"][metric] for r in records if metric in r.get("metrics", {})],
        dtype=torch.float64,
    )


def _hold_equal(cfg: RunConfig) -> None:
    """Train `cfg` on the ranks of this group and on one process that stands for them, and compare all they leave."""
    real = recorded_run(cfg, TorchrunRuntime(CPU))
    if dist.get_rank() != 0:
        return
    one = _virtual(cfg)
    virtual = recorded_run(one, Solo(CPU))
    assert (real.world_size, virtual.world_size) == (dist.get_world_size(), 1)
    assert virtual.final["test_error"] == real.final["test_error"]
    for metric in ("train_loss", "test_loss", "test_error"):
        assert len(_curve(cfg, metric)) >= 3
        assert_close(_curve(one, metric), _curve(cfg, metric), BOUND, metric)
    theirs = _state(cfg)
    assert _state(one).keys() == theirs.keys()
    for name, value in _state(one).items():
        assert_close(value, theirs[name], BOUND, name)


@pytest.mark.slow_if(lambda world_size, model, **_: (world_size == 2) != (model is MLP))
@pytest.mark.slow_if(lambda arm, model, **_: model is CNN and arm not in ("local", "sync", "ghost"))
@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize("model", [MLP, CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("arm", ARMS)
def test_virtual_ranks_train_and_are_measured_as_real_ones(world_size, tmp_path, arm, model):
    _hold_equal(_config(tmp_path, world_size, arm, model))


@pytest.mark.world_size(4)
@pytest.mark.parametrize("arm", DIFFERING)
def test_virtual_ranks_share_an_uneven_last_batch_as_real_ones(world_size, tmp_path, arm):
    # An epoch of 74 ends with a batch of 10, of which ranks get 2, 3, 2 and 3.
    cfg = _config(tmp_path, world_size, arm, MLP, {"limit": 74}, drop_last=False)
    _hold_equal(cfg)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("arm", ["local", "sync_group"])
def test_virtual_ranks_without_samples_do_as_real_ones(world_size, tmp_path, arm):
    # An epoch of 34 ends with a batch of 2, of which ranks get 0, 1, 0 and 1.
    cfg = _config(tmp_path, world_size, arm, CNN, {"limit": 34}, drop_last=False)
    _hold_equal(cfg)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("arm", ["local", "sync_group", "ghost"])
def test_virtual_ranks_are_dealt_classes_as_real_ones(world_size, tmp_path, arm):
    _hold_equal(_config(tmp_path / "by_class", world_size, arm, MLP, shares="by_class"))


@pytest.mark.world_size(4)
def test_the_arms_that_virtual_ranks_tell_apart_do_differ(world_size, tmp_path):
    """Else the gate could not fail: each arm's running statistics, and each but local_avg's weights, are its own."""
    if dist.get_rank() != 0:
        return
    states = {}
    for arm in DIFFERING:
        cfg = _virtual(_config(tmp_path, world_size, arm, MLP))
        train(cfg, Solo(CPU), Untracked())
        states[arm] = _state(cfg)
    key = "hidden.0.norm.running_var"
    means = {arm: tuple(state[key].tolist()) for arm, state in states.items()}
    assert len(set(means.values())) == len(DIFFERING)
    weights = {tuple(state["output.bias"].tolist()) for state in states.values()}
    assert len(weights) == len(DIFFERING) - 1
