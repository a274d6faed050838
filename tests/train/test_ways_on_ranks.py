"""Ways of training on ranks: one run is the same run however it is shared out."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from stops import asked_to_stop_at

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
from syncbn.errors import Stopped, UsageError
from syncbn.runtime import Solo, TorchrunRuntime
from syncbn.tracking import Untracked, read_journal
from syncbn.train import loop, recorded_run, train
from syncbn.train.parallel import Replicated

pytestmark = pytest.mark.untraced
CPU = torch.device("cpu")


def _config(folder, world_size, arm="sync", **options) -> RunConfig:
    defaults = {"steps": 10, "per_rank_batch": 12 // world_size, "precision": "float64"}
    return RunConfig(
        name=arm,
        runs_dir=str(folder),
        model=ModelConfig(name="cnn", width=4),
        data=DataConfig(limit=65),
        norm=NormConfig(name=arm),
        optim=OptimConfig(lr=0.05),
        train=TrainConfig(**defaults | options),
        launcher=LauncherConfig(num_workers=world_size),
    )


def _is_one_process(cfg, tolerance=1e-8):
    """Train `cfg` on the ranks, then on the first alone with the whole batch; both end with the same network."""
    ours = train(cfg, TorchrunRuntime(CPU), Untracked())
    if dist.get_rank() == 0:
        oracle_cfg = replace(cfg, name="oracle", norm=NormConfig(name="big_batch"))
        oracle = train(oracle_cfg, Solo(CPU), Untracked())
        assert ours.final["train_loss"] == pytest.approx(oracle.final["train_loss"], rel=tolerance)
        ranks, one = (load_latest(c.folder / "checkpoints") for c in (cfg, oracle_cfg))
        for name, value in ranks.model_state.items():
            assert_close(value.double(), one.model_state[name].double(), tolerance, name)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("drop_last", [True, False], ids=["whole batches", "uneven last batches"])
def test_ranks_accumulate_as_one_process_does(world_size, tmp_path, drop_last):
    _is_one_process(_config(tmp_path, world_size, accumulate=2, drop_last=drop_last))


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "option", [{"channels_last": True}, {"checkpoint_activations": True}, {"ema": 0.9}]
)
def test_ranks_compute_in_each_way_as_one_process_does(world_size, tmp_path, option):
    _is_one_process(_config(tmp_path, world_size, **option))


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_compiled_ranks_compute_as_one_process_does(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, compile=True, steps=4)
    _is_one_process(replace(cfg, model=ModelConfig(hidden=[16])), 1e-7)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("arm", ["sync", "local"])
def test_half_precision_trains_on_ranks(world_size, tmp_path, precision, arm):
    whole = train(
        _config(tmp_path / "w", 2, arm, precision="float32"), TorchrunRuntime(CPU), Untracked()
    )
    half = train(
        _config(tmp_path / "h", 2, arm, precision=precision), TorchrunRuntime(CPU), Untracked()
    )
    assert half.final["train_loss"] == pytest.approx(whole.final["train_loss"], rel=0.05)


@pytest.mark.world_size(2)
def test_gradients_are_reduced_once_a_step(world_size, tmp_path):
    reduces = []

    def seen(state, *batch):
        reduces.append(state.wrapped.require_backward_grad_sync)
        return real(state, *batch)

    real = loop._backward
    with patch.object(loop, "_backward", seen):
        train(
            _config(tmp_path, world_size, accumulate=3, steps=2), TorchrunRuntime(CPU), Untracked()
        )
    assert reduces == [False, False, True] * 2


@pytest.mark.world_size(2)
def test_stopped_with_averages_accumulation_and_bf16_a_run_goes_on_bit_by_bit(world_size, tmp_path):
    options = {"precision": "bf16", "accumulate": 2, "ema": 0.9, "agree_every": 1, "eval_every": 4}
    runtime = TorchrunRuntime(CPU)
    straight, cfg = (_config(tmp_path / part, 2, **options) for part in ("straight", "stopped"))
    whole = recorded_run(straight, runtime)
    with asked_to_stop_at(7), pytest.raises(Stopped):
        recorded_run(cfg, runtime)
    assert load_latest(cfg.folder / "checkpoints").meta.step == 7
    assert recorded_run(cfg, runtime).final == whole.final
    ours, theirs = (load_latest(c.folder / "checkpoints") for c in (cfg, straight))
    for name, value in ours.model_state.items():
        assert torch.equal(value, theirs.model_state[name]), name
    for name, average in ours.extra["ema"].items():
        assert torch.equal(average, theirs.extra["ema"][name]), name
    if dist.get_rank() == 0:
        assert _losses(cfg) == _losses(straight)


def _losses(cfg) -> dict[int, float]:
    records = read_journal(cfg.folder / "journal.jsonl")
    found = {r["step"]: r["metrics"] for r in records if "metrics" in r}
    return {
        step: metrics["train_loss"] for step, metrics in found.items() if "train_loss" in metrics
    }


@pytest.mark.world_size(2)
def test_parameters_that_several_ranks_cannot_train_are_named(world_size):
    assert world_size == 2
    network = torch.nn.Linear(2, 2)
    network.extra, network.spare = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    wrapped = Replicated(TorchrunRuntime(CPU)).wrapped(network)
    wrapped(torch.zeros(3, 2)).sum().backward()
    with pytest.raises(
        UsageError, match=r"no part in the loss, .*: extra.weight, extra.bias, spare"
    ):
        wrapped(torch.zeros(3, 2))
