"""`train.parallel=fsdp` trains the same network as `ddp`, and its checkpoints are the same."""

import math
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from stops import asked_to_stop_at
from torch import nn

from syncbn.checkpoint import load_latest
from syncbn.config import (
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    ParameterGroup,
    RunConfig,
    TrainConfig,
)
from syncbn.errors import NonFinite, Stopped, UsageError
from syncbn.norm import SyncBatchNorm
from syncbn.runtime import Solo, TorchrunRuntime
from syncbn.tracking import Untracked
from syncbn.train import loop, train
from syncbn.train.parallel import blocks, parallel
from syncbn.train.state import build

pytestmark = pytest.mark.untraced
CPU = torch.device("cpu")


def _config(folder, world_size=2, arm="sync", **options) -> RunConfig:
    """Five steps of 12 samples, the last of which are those that are left of 53, in uneven shares."""
    defaults = {"steps": 5, "per_rank_batch": 12 // world_size, "precision": "float64"}
    return RunConfig(
        name="run",
        runs_dir=str(folder),
        model=ModelConfig(name="cnn", width=4),
        data=DataConfig(limit=53),
        norm=NormConfig(name=arm, group_size=1, num_groups=2),
        optim=OptimConfig(lr=0.05, clip_norm=0.5, weight_decay=1e-3),
        train=TrainConfig(**defaults | {"drop_last": False} | options),
        launcher=LauncherConfig(num_workers=world_size),
    )


def _with(cfg: RunConfig, folder, **options) -> RunConfig:
    return replace(cfg, runs_dir=str(folder), train=replace(cfg.train, **options))


def _trained(cfg: RunConfig):
    """What `cfg` ends with: its final metrics, and its checkpoint."""
    final = train(cfg, TorchrunRuntime(CPU), Untracked()).final
    return final, load_latest(cfg.folder / "checkpoints")


def _tensors(checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by a name: of the model, the optimiser and the averages."""
    found = dict(checkpoint.model_state)
    found |= {f"average {name}": one for name, one in checkpoint.extra.get("ema", {}).items()}
    for number, values in checkpoint.optimizer_state["state"].items():
        found |= {f"{number}.{key}": one for key, one in values.items() if one is not None}
    return found


def _assert_near(value, expected, tolerance, name) -> None:
    """Within `tolerance` of values of about 1; the gradient of a bias before a norm is 0 but for rounding."""
    assert torch.allclose(value, expected, rtol=100 * tolerance, atol=tolerance), name


def _same_run(cfg: RunConfig, tmp_path, tolerance=1e-9) -> None:
    """`cfg` gives the same losses, network and optimiser under ddp and under fsdp."""
    (ours, sharded), (theirs, whole) = (
        _trained(_with(cfg, tmp_path / name, parallel=name)) for name in ("fsdp", "ddp")
    )
    assert ours == pytest.approx(theirs, rel=tolerance)
    found, expected = _tensors(sharded), _tensors(whole)
    assert set(found) == set(expected)
    for name, value in expected.items():
        _assert_near(found[name], value, tolerance, name)


@pytest.mark.world_size(2)
def test_fsdp_trains_as_ddp_does_with_uneven_shares(world_size, tmp_path):
    _same_run(_config(tmp_path, ema=0.9, accumulate=2, per_rank_batch=3), tmp_path)


@pytest.mark.world_size(3)
def test_a_rank_without_a_part_of_a_parameter_takes_part(world_size, tmp_path):
    """Of 4 rows, 3 ranks get 2, 2 and none."""
    _same_run(_config(tmp_path, 3), tmp_path)


@pytest.mark.slow
@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize("arm", ["none", "local", "local_avg", "sync_group", "group_norm", "ghost"])
def test_fsdp_trains_as_ddp_does_in_every_arm(world_size, tmp_path, arm):
    whole_shares = {"per_rank_batch": 4, "drop_last": True}
    cfg = _config(tmp_path, world_size, arm, **whole_shares)
    norm = replace(cfg.norm, group_size=world_size // 2)
    _same_run(replace(cfg, norm=norm), tmp_path)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "options",
    [{"channels_last": True}, {"checkpoint_activations": True}, {"accumulate": 3, "eval_every": 2}],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_fsdp_trains_as_ddp_does_in_each_way(world_size, tmp_path, options, optimizer):
    cfg = _config(tmp_path, **options)
    groups = {"hidden.*.affine.*": ParameterGroup(lr_scale=0.5), "output.bias": ParameterGroup()}
    optim = replace(cfg.optim, name=optimizer, lr=0.01, groups=groups)
    _same_run(replace(cfg, optim=optim), tmp_path, 1e-7)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_means_the_same_under_fsdp(world_size, tmp_path, precision):
    cfg = _config(tmp_path, precision=precision, checkpoint_activations=True)
    ours, theirs = (
        _trained(_with(cfg, tmp_path / name, parallel=name))[0] for name in ("fsdp", "ddp")
    )
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.world_size(2)
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(world_size, tmp_path):
    """Only the first rank has a part of the gradient that is not finite."""
    state = build(_config(tmp_path, precision="fp16", parallel="fsdp"), TorchrunRuntime(CPU))
    state.scale._scaler.scale(torch.ones(()))
    before = [one.to_local().clone() for one in state.model.parameters()]
    for one in state.model.parameters():
        one.grad = torch.ones_like(one)
        one.grad.to_local().fill_(math.inf if state.runtime.rank == 0 else 1.0)
    scale = state.scale.require_usable()
    state.scale.unscale(state.optimizer)
    state.scale.step(state.optimizer)
    assert state.scale.require_usable() == scale / 2
    for one, value in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(one.to_local(), value)


@pytest.mark.slow_if(lambda first, second, **_: first == second)
@pytest.mark.world_size(2)
@pytest.mark.parametrize("second", ["ddp", "fsdp"])
@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_a_checkpoint_of_either_goes_on_under_the_other(world_size, tmp_path, first, second):
    """Under the same again, bit by bit."""
    options = {"ema": 0.9, "agree_every": 1, "eval_every": 2, "keep_best": True, "steps": 6}
    cfg = _config(tmp_path, **options)
    straight, expected = _trained(_with(cfg, tmp_path / "straight", parallel=second))
    moved = _with(cfg, tmp_path / "moved", parallel=first)
    with asked_to_stop_at(3), pytest.raises(Stopped):
        _trained(moved)
    final, found = _trained(_with(moved, tmp_path / "moved", parallel=second))
    assert found.meta.step == 6
    tolerance = 0 if first == second else 1e-9
    assert final == pytest.approx(straight, rel=tolerance, abs=tolerance)
    for name, value in _tensors(expected).items():
        _assert_near(_tensors(found)[name], value, tolerance, name)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_fp16_with_adam_and_accumulation_goes_on_bit_by_bit(world_size, tmp_path):
    options = {"precision": "fp16", "accumulate": 2, "agree_every": 1, "parallel": "fsdp"}
    cfg = _config(tmp_path, **options)
    cfg = replace(cfg, optim=replace(cfg.optim, name="adamw", lr=0.01))
    _, expected = _trained(_with(cfg, tmp_path / "straight"))
    stopped = _with(cfg, tmp_path / "stopped")
    with asked_to_stop_at(3), pytest.raises(Stopped):
        _trained(stopped)
    _, found = _trained(stopped)
    assert found.extra["loss_scale"] == expected.extra["loss_scale"]
    for name, value in _tensors(expected).items():
        assert torch.equal(_tensors(found)[name], value), name


@pytest.mark.world_size(2)
def test_a_run_of_one_process_goes_on_sharded_over_two(world_size, tmp_path):
    options = {"arm": "group_norm", "agree_every": 1, "parallel": "fsdp"}
    alone = _config(tmp_path, 1, **options)
    if dist.get_rank() == 0:
        with asked_to_stop_at(3), pytest.raises(Stopped):
            train(alone, Solo(CPU), Untracked())
    dist.barrier()
    _, moved = _trained(_config(tmp_path, world_size, **options))
    _, straight = _trained(_config(tmp_path / "straight", world_size, **options))
    for name, value in _tensors(straight).items():
        _assert_near(_tensors(moved)[name], value, 1e-9, name)


@pytest.mark.world_size(2)
def test_gradients_are_reduced_with_the_last_micro_batch_alone(world_size, tmp_path):
    """Before, no parameter has a part of its gradient."""
    reduced, real = [], loop._backward

    def backward(state, *batch):
        share = real(state, *batch)
        reduced.append({one.grad is not None for one in state.model.parameters()})
        return share

    cfg = _config(tmp_path, accumulate=3, per_rank_batch=2, steps=2, parallel="fsdp")
    with patch.object(loop, "_backward", backward):
        train(cfg, TorchrunRuntime(CPU), Untracked())
    assert reduced == [{False}, {False}, {True}] * 2


@pytest.mark.world_size(2)
def test_a_rank_holds_half_of_the_parameters_and_of_what_the_optimiser_remembers(
    world_size, tmp_path
):
    cfg = _config(tmp_path, parallel="fsdp", steps=1, ema=0.9)
    with patch.object(loop, "build", lambda *args: states.append(build(*args)) or states[-1]):
        states = []
        train(cfg, TorchrunRuntime(CPU), Untracked())
    (state,) = states
    for one in state.model.parameters():
        momentum = state.optimizer.state[one]["momentum_buffer"]
        for held in (one, momentum):
            assert held.to_local().numel() * 2 == one.numel()
    for average in state.ema.state_dict().values():
        assert average.to_local().numel() * 2 == average.numel()


class _Unusual(nn.Module):
    """Parts that share a weight, one that is used twice, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        self.parts[1].weight = self.parts[0].weight
        self.unused = nn.Linear(3, 3)
        self.output = nn.Linear(4, 1)

    def forward(self, x):
        return self.output(self.parts[2](self.parts[:3](x)))


def test_a_block_has_its_parameters_to_itself():
    model = _Unusual()
    assert blocks(model) == [model.parts[2], model.parts[3]]
    assert blocks(nn.Linear(2, 2)) == []
    outside = _Unusual()
    outside.output.weight = nn.Parameter(torch.ones(1, 4))
    outside.again = outside.parts[3].weight
    assert blocks(outside) == [outside.parts[2]]


@pytest.mark.world_size(2)
def test_shared_repeated_and_unused_parameters_get_the_gradient_that_one_process_has(world_size):
    torch.manual_seed(0)
    ours, alone, runtime = _Unusual().double(), _Unusual().double(), TorchrunRuntime(CPU)
    alone.load_state_dict(ours.state_dict())
    x = torch.randn(4, 4, dtype=torch.float64)
    spread = parallel("fsdp", runtime)
    spread.place(ours)
    spread.wrapped(ours)(x.chunk(2)[runtime.rank]).mean().backward()
    alone(x).mean().backward()
    for (name, one), other in zip(ours.named_parameters(), alone.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
        else:
            assert_close(one.grad.full_tensor(), other.grad, 1e-12, name)


class _Reaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return x @ self.parts[0].weight


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


@pytest.mark.world_size(2)
@pytest.mark.parametrize("model", [_Reaching, _Scaled])
def test_a_model_that_cannot_be_cut_is_refused_in_one_line(world_size, model):
    network, spread = model(), parallel("fsdp", TorchrunRuntime(CPU))

    def train():
        spread.place(network)
        spread.wrapped(network)(torch.ones(2, 4))

    words = rf"^train.parallel=fsdp .* {model.__name__}.*=ddp$"
    with pytest.raises(UsageError, match=words) as found:
        train()
    assert "\n" not in str(found.value)


@pytest.mark.world_size(2)
def test_after_an_evaluation_training_gathers_parameters_anew(world_size):
    """As the averages of `train.ema` are taken out again."""
    network, spread = nn.Linear(2, 2), parallel("fsdp", TorchrunRuntime(CPU))
    spread.place(network)
    parts, x = list(network.parameters()), torch.ones(1, 2)
    with torch.no_grad():
        with spread.evaluation():
            network(x)
        for one in parts:
            one.zero_()
    assert not network(x).any()


@pytest.mark.world_size(4)
def test_values_that_are_not_finite_in_one_group_end_all_ranks_together(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, "sync_group", parallel="fsdp", agree_every=1, steps=3)
    cfg = replace(cfg, norm=replace(cfg.norm, group_size=2))
    real = loop._backward

    def poisoned(state, size, x, y):
        x = x * math.nan if dist.get_rank() == 3 and state.step == 1 else x
        return real(state, size, x, y)

    with patch.object(loop, "_backward", poisoned), pytest.raises(NonFinite, match="rank 2, 3"):
        train(cfg, TorchrunRuntime(CPU), Untracked())


@pytest.mark.slow
@pytest.mark.world_size(4)
@pytest.mark.parametrize("group_size", [2, 4])
def test_a_slow_rank_is_waited_for_between_gathered_blocks(world_size, group_size):
    """Longer than the watchdog takes to tell a blocked rank; some wait in a layer, some for a block."""
    torch.manual_seed(0)
    parts = (
        nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4, process_group=group_size)) for _ in range(3)
    )
    network, spread = nn.Sequential(nn.Sequential(*parts)), parallel("fsdp", TorchrunRuntime(CPU))
    spread.place(network)
    slow = dist.get_rank() == 1
    network[0][1][0].register_forward_hook(lambda *_: time.sleep(8 if slow else 0))
    network[0][1][0].register_full_backward_hook(lambda *_: time.sleep(8 if slow else 0))
    network(torch.randn(3, 4)).square().mean().backward()
    assert all(one.grad.full_tensor().isfinite().all() for one in network.parameters())
