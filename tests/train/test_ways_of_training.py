"""Ways of training in one process: precision, accumulation, averages, memory format, the compiler, what is kept."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from syncbn.after.find import find
from syncbn.after.trained import chosen
from syncbn.checkpoint import load, load_best, load_latest
from syncbn.checks import check
from syncbn.compare.study.design import arm_configs
from syncbn.compose import compose, vary
from syncbn.config import (
    Config,
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    ParameterGroup,
    ProbeConfig,
    RunConfig,
    TrainConfig,
    config_hash,
    identity_of,
    resume_hash,
)
from syncbn.errors import NonFinite, UsageError
from syncbn.kept_checkpoint import kept_checkpoint
from syncbn.models import build_model
from syncbn.optim import build_optimizer, set_rate
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import recorded_run
from syncbn.train.accumulate import micro_sizes
from syncbn.train.ema import Ema
from syncbn.train.network import trained
from syncbn.train.state import build

SOLO = Solo(torch.device("cpu"))
HALVES = ["bf16", "fp16"]


def _config(folder, model="mlp", norm="sync", **options) -> RunConfig:
    return RunConfig(
        runs_dir=str(folder),
        model=ModelConfig(name=model, hidden=[16, 16], width=4),
        data=DataConfig(limit=100),
        norm=NormConfig(norm),
        train=TrainConfig(**{"steps": 12, "per_rank_batch": 16} | options),
    )


def _losses(cfg) -> dict[int, float]:
    records = list(read_journal(cfg.folder / "journal.jsonl"))
    return {
        r["step"]: m["train_loss"] for r in records if "train_loss" in (m := r.get("metrics", {}))
    }


def _states(*configs):
    return [load_latest(cfg.folder / "checkpoints").model_state for cfg in configs]


# What was there before


def test_hashes_of_runs_with_defaults_are_those_they_always_had():
    assert (config_hash(RunConfig()), resume_hash(RunConfig())) == ("b962a15df708", "c398c8375fbf")
    double = RunConfig(train=TrainConfig(precision="float64"))
    assert (config_hash(double), resume_hash(double)) == ("8a158f3795e9", "d1c7eb8b09bb")


@pytest.mark.parametrize(
    "option",
    [
        {"precision": "bf16"},
        {"accumulate": 2},
        {"channels_last": True},
        {"compile": True},
        {"checkpoint_activations": True},
        {"ema": 0.9},
        {"parallel": "fsdp"},
    ],
)
def test_what_decides_numbers_is_in_the_hash(option):
    assert config_hash(RunConfig(train=TrainConfig(**option))) != config_hash(RunConfig())


def test_a_run_goes_on_however_it_is_spread_over_ranks():
    sharded = RunConfig(train=TrainConfig(parallel="fsdp"))
    assert resume_hash(sharded) == resume_hash(RunConfig())


def test_one_process_has_nothing_to_shard_and_says_so(tmp_path):
    plain, sharded = (_config(tmp_path / name, steps=3, parallel=name) for name in ("ddp", "fsdp"))
    assert recorded_run(plain, SOLO).final == recorded_run(sharded, SOLO).final
    records = read_journal(sharded.folder / "journal.jsonl")
    notes = [r["text"] for r in records if r.get("event") == "note"]
    assert notes == ["train.parallel=fsdp: one process trains, and holds all itself"]


def test_a_journal_with_the_old_key_is_read_as_the_new_one():
    tree = {group: {} for group in ("model", "data", "optim", "launcher")}
    tree["train"] = {"dtype": "float64"}
    assert identity_of(tree)["train"] == {"precision": "float64"}


def test_the_old_key_is_refused_with_the_new_one_as_a_hint():
    with pytest.raises(UsageError, match=r"here it is train\.precision \(float32"):
        compose(["train.dtype=float64"])


REFUSED = {
    "train.precision='half'": Config(train=TrainConfig(precision="half")),
    "train.accumulate=0": Config(train=TrainConfig(accumulate=0)),
    "train.ema=1.0": Config(train=TrainConfig(ema=1.0)),
    "train.ema=0.0": Config(train=TrainConfig(ema=0.0)),
    "train.accumulate=2": Config(train=TrainConfig(accumulate=2, shares="by_class")),
    "train.compile=True": Config(train=TrainConfig(compile=True, checkpoint_activations=True)),
    "train.parallel='zero'": Config(train=TrainConfig(parallel="zero")),
    "train.compile=True ": Config(
        train=TrainConfig(compile=True, parallel="fsdp"), launcher=LauncherConfig(num_workers=2)
    ),
    "probe gradients": Config(
        train=TrainConfig(parallel="fsdp"),
        launcher=LauncherConfig(num_workers=2),
        probe=ProbeConfig(names=["exchange", "gradients"]),
    ),
    "probe oracle": Config(
        train=TrainConfig(precision="bf16"), probe=ProbeConfig(names=["oracle"])
    ),
    "probe leak": Config(train=TrainConfig(accumulate=2), probe=ProbeConfig(names=["leak"])),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_meant_is_refused_with_what_is_allowed(named):
    with pytest.raises(UsageError) as error:
        check(REFUSED[named])
    assert str(error.value).startswith(f"{named.strip()} is not allowed")


def test_keeping_the_best_needs_evaluations():
    with pytest.raises(UsageError, match=r"train\.keep_best=True needs train\.eval_every > 0"):
        check(Config(train=TrainConfig(keep_best=True)))


# Precision


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("norm", ["none", "local", "sync", "group_norm", "ghost"])
def test_half_precision_trains_every_arm_like_float32(tmp_path, norm, precision):
    whole = recorded_run(_config(tmp_path / "whole", "cnn", norm, steps=20), SOLO)
    cfg = _config(tmp_path / "half", "cnn", norm, steps=20, precision=precision)
    half = recorded_run(cfg, SOLO)
    assert half.final["train_loss"] == pytest.approx(whole.final["train_loss"], rel=0.05)
    assert half.final["train_loss"] != whole.final["train_loss"]
    (state,) = _states(cfg)
    assert {v.dtype for v in state.values()} <= {torch.float32, torch.int64}


def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_no_error(tmp_path):
    state = build(_config(tmp_path, precision="fp16"), SOLO)
    assert state.scale is not None
    before = [p.clone() for p in state.model.parameters()]
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    state.scale.scaled(torch.ones(()))
    state.scale.unscale(state.optimizer)
    state.scale.step(state.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert state.scale.require_usable() == 2**15


def test_gradients_that_overflow_at_any_scale_are_an_error(tmp_path):
    scale = build(_config(tmp_path, precision="fp16"), SOLO).scale
    scale.load_state_dict(scale.state_dict() | {"scale": 0.5})
    scale.scaled(torch.ones(()))
    with pytest.raises(NonFinite, match=r"train\.precision=fp16.*bf16"):
        scale.require_usable()


def test_clipping_sees_unscaled_gradients(tmp_path):
    finals = [
        recorded_run(
            replace(_config(tmp_path / p, precision=p), optim=OptimConfig(clip_norm=0.1)), SOLO
        ).final["train_loss"]
        for p in ("float32", "fp16")
    ]
    assert finals[0] == pytest.approx(finals[1], rel=0.02)


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "accumulate": 2, "ema": 0.9},
        {"precision": "fp16", "accumulate": 3, "drop_last": False},
        {"precision": "bf16", "checkpoint_activations": True, "channels_last": True},
    ],
    ids=["bf16, averages", "fp16, uneven", "checkpointing"],
)
def test_resuming_continues_bit_for_bit(tmp_path, options):
    straight = _config(tmp_path / "straight", "cnn", eval_every=4, **options)
    cfg = _config(tmp_path / "resumed", "cnn", eval_every=4, checkpoint_every=5, **options)
    whole = recorded_run(straight, SOLO)
    recorded_run(cfg, SOLO)
    (cfg.folder / "summary.json").unlink()
    (cfg.folder / "checkpoints" / "LATEST").write_text("step-000010\n")
    again = recorded_run(cfg, SOLO)
    assert again.final == whole.final
    assert _losses(cfg) == _losses(straight)
    ours, theirs = (load_latest(c.folder / "checkpoints") for c in (cfg, straight))
    assert all(torch.equal(v, theirs.model_state[k]) for k, v in ours.model_state.items())
    for name, average in ours.extra.get("ema", {}).items():
        assert torch.equal(average, theirs.extra["ema"][name])
    assert ours.extra.get("loss_scale") == theirs.extra.get("loss_scale")


# Accumulation


def test_a_step_is_cut_into_as_few_even_micro_batches_as_hold_it():
    assert micro_sizes(32, 8) == [8, 8, 8, 8]
    assert micro_sizes(17, 8) == [5, 6, 6]
    assert micro_sizes(3, 8) == [3]


@pytest.mark.parametrize("drop_last", [True, False])
def test_without_a_batch_norm_accumulation_is_one_large_batch(tmp_path, drop_last):
    options = {"precision": "float64", "drop_last": drop_last}
    one = _config(tmp_path / "one", norm="none", per_rank_batch=32, **options)
    many = _config(tmp_path / "many", norm="none", per_rank_batch=8, accumulate=4, **options)
    ours, theirs = recorded_run(many, SOLO), recorded_run(one, SOLO)
    assert ours.final["train_loss"] == pytest.approx(theirs.final["train_loss"], rel=1e-10)
    assert load_latest(many.folder / "checkpoints").meta.position == 12 * 32


def test_statistics_are_those_of_a_micro_batch_which_the_journal_says(tmp_path):
    one = _config(tmp_path / "one", per_rank_batch=32, precision="float64")
    many = _config(tmp_path / "many", per_rank_batch=8, accumulate=4, precision="float64")
    assert recorded_run(many, SOLO).final != recorded_run(one, SOLO).final
    (note,) = [r for r in read_journal(many.folder / "journal.jsonl") if r.get("event") == "note"]
    assert "statistics are those of a micro-batch of 8" in note["text"]


# Averages


def test_an_average_is_the_sum_of_its_definition_and_leaves_the_parameters():
    model = torch.nn.Linear(2, 1)
    ema, expected = Ema(model, 0.75), model.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    own = model.weight.detach().clone()
    with ema.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), own)


def test_averages_change_what_is_measured_and_not_what_is_trained(tmp_path):
    plain, averaged = _config(tmp_path / "plain"), _config(tmp_path / "ema", ema=0.9)
    one, other = recorded_run(plain, SOLO), recorded_run(averaged, SOLO)
    assert one.final["train_loss"] == other.final["train_loss"]
    assert one.final["test_loss"] != other.final["test_loss"]
    states = _states(plain, averaged)
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# Memory format, compiler, activation checkpointing


@pytest.mark.parametrize("norm", ["sync", "local", "ghost"])
@pytest.mark.parametrize("option", ["channels_last", "checkpoint_activations"])
def test_how_it_is_computed_changes_no_number(tmp_path, option, norm):
    plain = _config(tmp_path / "plain", "cnn", norm, precision="float64")
    other = _config(tmp_path / "other", "cnn", norm, precision="float64", **{option: True})
    one, two = recorded_run(plain, SOLO), recorded_run(other, SOLO)
    assert two.final["train_loss"] == pytest.approx(one.final["train_loss"], rel=1e-9)
    for name, value in _states(other)[0].items():
        torch.testing.assert_close(value, _states(plain)[0][name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.untraced
def test_the_compiler_changes_numbers_by_rounding_alone(tmp_path):
    plain = _config(tmp_path / "plain", steps=5)
    compiled = _config(tmp_path / "compiled", steps=5, compile=True)
    one, two = recorded_run(plain, SOLO), recorded_run(compiled, SOLO)
    assert two.final["train_loss"] == pytest.approx(one.final["train_loss"], rel=1e-4)
    assert _states(compiled)[0].keys() == _states(plain)[0].keys()


def test_a_model_without_parts_to_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"checkpoint_activations=True is not allowed for a Linear"
    ):
        trained(torch.nn.Linear(2, 2), TrainConfig(checkpoint_activations=True), SOLO.device)


@pytest.mark.untraced
def test_without_a_compiler_the_error_says_what_to_do(tmp_path, monkeypatch):
    def fail(*_, **__):
        def call(images):
            raise BackendCompilerFailed(fail, RuntimeError("no compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UsageError, match=r"train\.compile=True does not work here"):
        recorded_run(_config(tmp_path, compile=True), SOLO)


# The best


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    cfg = _config(tmp_path, steps=40, eval_every=5, checkpoint_every=5, keep_best=True)
    cfg = replace(cfg, optim=OptimConfig(lr=0.3, schedule="constant"))
    summary = recorded_run(cfg, SOLO)
    records = list(read_journal(cfg.folder / "journal.jsonl"))
    errors = {
        r["step"]: m["test_error"] for r in records if "test_error" in (m := r.get("metrics", {}))
    }
    best = min(errors, key=lambda step: (errors[step], step))
    kept = load_best(cfg.folder / "checkpoints")
    assert kept.meta.step == best == summary.final["best_step"]
    assert summary.final["best_error"] == errors[best]
    names = {p.name for p in (cfg.folder / "checkpoints").glob("step-*")}
    assert names == {"step-000035", "step-000040", kept.path.name}
    assert json.loads((cfg.folder / "summary.json").read_text())["final"]["best_step"] == best


@pytest.mark.parametrize(
    "ending", [{"patience": 3}, {"target_error": 0.001}], ids=["patience", "target"]
)
def test_a_run_that_may_end_early_keeps_and_names_the_best_and_it_stands_for_the_run(
    tmp_path, ending
):
    cfg = _config(tmp_path, steps=60, eval_every=2, agree_every=1, **ending)
    cfg = replace(cfg, optim=OptimConfig(lr=1.0, schedule="constant"))
    final = recorded_run(cfg, SOLO).final
    records = list(read_journal(cfg.folder / "journal.jsonl"))
    errors = {
        r["step"]: m["test_error"] for r in records if "test_error" in (m := r.get("metrics", {}))
    }
    best = min(errors, key=lambda step: (errors[step], step))
    assert best < max(errors) - 4, "the newest two checkpoints would not hold it"
    assert (final["best_step"], final["best_error"]) == (best, errors[best])
    assert kept_checkpoint(cfg.folder).path.name == f"step-{best:06d}"
    *_, note = (r["text"] for r in records if r.get("event") == "note")
    assert note.startswith(f"best test_error: {errors[best]:.6g} after step {best}, whose check")
    assert chosen(find(str(cfg.folder)), None).meta.step == best


def test_a_trial_of_a_study_keeps_no_best_unless_asked():
    asked = compose(["study=demo", "train.patience=2", "train.eval_every=5"])
    assert asked.train.keeps_best
    assert not any(run.train.keeps_best for run in arm_configs(asked).values())
    asked = compose(["study=demo", "train.eval_every=5", "train.keep_best=true"])
    assert all(run.train.keeps_best for run in arm_configs(asked).values())


def test_without_it_none_is_kept(tmp_path):
    cfg = _config(tmp_path, eval_every=5)
    recorded_run(cfg, SOLO)
    assert load_best(cfg.folder / "checkpoints") is None
    assert load(load_latest(cfg.folder / "checkpoints").path).meta.step == 12


# Parameter groups


def _mlp():
    return build_model(ModelConfig(hidden=[4]), (1, 2, 2), 3, seed=0)


def test_parameters_that_fit_a_pattern_have_their_own_rate_and_decay():
    groups = {
        "hidden.*": ParameterGroup(lr_scale=0.1),
        "*.bias": ParameterGroup(weight_decay=0.25),
    }
    model = _mlp()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5, groups=groups))
    set_rate(optimizer, 2.0)
    found = {
        id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        "hidden.0.affine.weight": (0.2, 0.5),
        "hidden.0.affine.bias": (0.2, 0.0),
        "hidden.0.norm.weight": (0.2, 0.0),
        "hidden.0.norm.bias": (0.2, 0.0),
        "output.weight": (2.0, 0.5),
        "output.bias": (2.0, 0.25),
    }


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(UsageError, match=r"optim\.groups: pattern 'hiden\.\*' is not allowed"):
        build_optimizer(_mlp(), OptimConfig(groups={"hiden.*": ParameterGroup()}))


def test_groups_are_composed_checked_and_hashed():
    cfg = compose(["optim.groups={hidden.*:{lr_scale:0.1,weight_decay:0.0}}"])
    assert cfg.optim.groups == {"hidden.*": ParameterGroup(0.1, 0.0)}
    assert config_hash(cfg) != config_hash(compose([]))
    with pytest.raises(UsageError, match="lrscale"):
        compose(["optim.groups={hidden.*:{lrscale:0.1}}"])
    varied = vary(compose([]), ["optim.groups={hidden.*: {lr_scale: 0.5}}"])
    assert varied.optim.groups == {"hidden.*": ParameterGroup(0.5)}
    with pytest.raises(UsageError, match=r"optim\.groups=.* is not allowed"):
        compose(["optim.groups={hidden.*:{lr_scale:-1}}"])


def test_virtual_ranks_accumulate(tmp_path):
    cfg = replace(
        _config(tmp_path, norm="local", per_rank_batch=4, accumulate=2, virtual=True),
        launcher=LauncherConfig(num_workers=3),
    )
    recorded_run(cfg, SOLO)
    assert load_latest(cfg.folder / "checkpoints").meta.global_batch == 24
