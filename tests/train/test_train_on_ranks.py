"""The training loop on ranks: one run is the same run however it is shared out."""

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from saves import written_at_once
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
from syncbn.errors import NonFinite, OutOfTime, Stopped
from syncbn.norm import RanksDisagree
from syncbn.runtime import Solo, TorchrunRuntime
from syncbn.tracking import Untracked, read_journal
from syncbn.train import loop, recorded_run, train
from syncbn.train.agreement import Agreement
from syncbn.train.saving import Saving
from syncbn.train.state import build

pytestmark = pytest.mark.untraced
CPU = torch.device("cpu")


def _config(folder, world_size, arm="sync", **train_options) -> RunConfig:
    options = {
        "steps": 20,
        "per_rank_batch": 24 // world_size,
        "precision": "float64",
    } | train_options
    return RunConfig(
        name=f"{arm}",
        runs_dir=str(folder),
        model=ModelConfig(hidden=[16]),
        data=DataConfig(limit=60),
        norm=NormConfig(name=arm),
        optim=OptimConfig(lr=0.05),
        train=TrainConfig(**options),
        launcher=LauncherConfig(num_workers=world_size),
    )


@pytest.mark.world_size(2)
def test_each_rank_draws_numbers_of_its_own_which_the_seed_decides(world_size, tmp_path):
    """Forked ranks begin with one state of numpy's generator."""
    runtime, seen = TorchrunRuntime(CPU), []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 - what a fork inherits
        build(_config(tmp_path, world_size), runtime)
        seen.append([random.random(), np.random.random(), float(torch.rand(()))])  # noqa: NPY002
        random.random()
    assert seen[0] == seen[1]
    others = runtime.from_main(torch.tensor(seen[0], dtype=torch.float64)).tolist()
    assert all((a == b) == runtime.is_main for a, b in zip(seen[0], others, strict=True))


def _losses(folder: Path) -> dict[int, float]:
    records = read_journal(folder / "journal.jsonl")
    return {
        r["step"]: r["metrics"]["train_loss"]
        for r in records
        if "train_loss" in r.get("metrics", {})
    }


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("drop_last", [True, False], ids=["whole batches", "uneven last batches"])
def test_synchronised_ranks_train_as_one_process_on_the_whole_batch(
    world_size, tmp_path, drop_last
):
    cfg = _config(tmp_path, world_size, drop_last=drop_last)
    if not drop_last:  # an epoch of 65 ends with a batch of 17, which no world size here divides
        cfg = replace(cfg, data=replace(cfg.data, limit=60 + 5))
    ours = train(cfg, TorchrunRuntime(CPU), Untracked())
    oracle_cfg = replace(cfg, name="oracle", norm=NormConfig(name="big_batch"))
    if dist.get_rank() == 0:
        oracle = train(oracle_cfg, Solo(CPU), Untracked())
        assert ours.final["train_loss"] == pytest.approx(oracle.final["train_loss"], rel=1e-9)
        ranks, one = (load_latest(c.folder / "checkpoints") for c in (cfg, oracle_cfg))
        for name, value in ranks.model_state.items():
            assert_close(value.double(), one.model_state[name].double(), 1e-8, name)


@pytest.mark.world_size(2)
def test_every_rank_gets_the_same_summary_and_rank_0_alone_writes(world_size, tmp_path):
    cfg = _config(tmp_path, world_size)
    summary = recorded_run(cfg, TorchrunRuntime(CPU))
    finals = [None] * world_size
    dist.all_gather_object(finals, summary.final)
    assert finals[0] == finals[1]
    assert json.loads((cfg.folder / "summary.json").read_text())["final"] == summary.final
    events = [r["event"] for r in read_journal(cfg.folder / "journal.jsonl") if "event" in r]
    assert events == ["start", "checkpoint", "end"]
    assert list(_losses(cfg.folder)) == list(range(1, 21))


@pytest.mark.world_size(2)
def test_a_signal_on_any_rank_stops_all_after_a_save_and_resuming_is_bit_exact(
    world_size, tmp_path
):
    runtime = TorchrunRuntime(CPU)
    straight = _config(tmp_path / "straight", world_size, agree_every=1)
    recorded_run(straight, runtime)
    cfg = _config(tmp_path / "stopped", world_size, agree_every=1)
    tracker = _KillAt(7, dist.get_rank() == 1)
    with pytest.raises(Stopped) as stopped:
        train(cfg, runtime, tracker)
    assert stopped.value.exit_code == 143
    assert load_latest(cfg.folder / "checkpoints").meta.step < 20
    recorded_run(cfg, runtime)
    ours, theirs = (load_latest(c.folder / "checkpoints") for c in (cfg, straight))
    for name, value in ours.model_state.items():
        assert torch.equal(value, theirs.model_state[name]), name


@pytest.mark.world_size(2)
def test_a_run_of_one_process_goes_on_on_two_ranks_with_the_same_global_batch(world_size, tmp_path):
    straight = _config(tmp_path / "straight", 1)
    alone = _config(tmp_path / "moved", 1, time_limit_s=1e-6)
    rank = dist.get_rank()
    dist.destroy_process_group()  # a process alone is one without ranks around it
    if rank == 0:
        train(straight, Solo(CPU), Untracked())
        with pytest.raises(OutOfTime):
            train(alone, Solo(CPU), Untracked())
    store = dist.FileStore(str(tmp_path / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    moved = _config(tmp_path / "moved", world_size)
    assert 0 < load_latest(moved.folder / "checkpoints").meta.step < 20
    train(moved, TorchrunRuntime(CPU), Untracked())
    ours, theirs = (load_latest(c.folder / "checkpoints") for c in (moved, straight))
    for name, value in ours.model_state.items():
        assert_close(value.double(), theirs.model_state[name].double(), 1e-8, name)


class _KillAt(Untracked):
    """Sends this process SIGTERM once `step` is recorded, if it is the chosen rank."""

    def __init__(self, step, chosen):
        self.step, self.chosen = step, chosen

    def metrics(self, step, values):
        if self.chosen and step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.world_size(2, 3)
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_its_name(world_size):
    agreement = Agreement(TorchrunRuntime(CPU))
    for step in (1, 2, 3):
        bad = step == 2 and dist.get_rank() == 1
        agreement.add(step, torch.tensor(float("nan") if bad else 0.5), 1)
    agreement.start(0, False, False)
    with pytest.raises(NonFinite, match=r"loss of step 2 is not finite on rank 1:"):
        agreement.finish()


@pytest.mark.world_size(2)
def test_ranks_that_took_other_steps_are_told_where_they_agree(world_size):
    agreement = Agreement(TorchrunRuntime(CPU))
    for step in range(world_size + dist.get_rank()):
        agreement.add(step, torch.ones(()), 1)
    with pytest.raises(RanksDisagree, match="the loop's own sum"):
        agreement.start(0, False, False)


@pytest.mark.world_size(2)
def test_a_run_that_diverges_ends_with_an_error_on_every_rank(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, arm="none", precision="float32")
    cfg = replace(cfg, optim=OptimConfig(lr=1e30, momentum=0.0))
    with pytest.raises(NonFinite, match="not finite"):
        train(cfg, TorchrunRuntime(CPU), Untracked())


@pytest.mark.world_size(2)
def test_local_statistics_are_rank_zeros_and_local_avg_the_mean_of_all(world_size, tmp_path):
    runtime = TorchrunRuntime(CPU)
    states = {}
    for arm in ("local", "local_avg"):
        cfg = _config(tmp_path, world_size, arm=arm)
        train(cfg, runtime, Untracked())
        states[arm] = load_latest(cfg.folder / "checkpoints").model_state
    key = next(name for name in states["local"] if name.endswith("running_mean"))
    weights = key.replace("running_mean", "weight")
    assert torch.equal(states["local"][weights], states["local_avg"][weights])
    assert not torch.equal(states["local"][key], states["local_avg"][key])


@pytest.mark.world_size(2)
@pytest.mark.slow_if(lambda arm, **_: arm == "local")
@pytest.mark.parametrize("arm", ["local_avg", "local"])
def test_a_save_changes_no_bit_of_statistics_that_differ_between_ranks(world_size, tmp_path, arm):
    """Not in the run that is saved, and not in one that goes on from it."""
    runtime, cfg = TorchrunRuntime(CPU), _config(tmp_path, world_size, arm, agree_every=1)
    straight, saved, stopped, by_clock = (
        replace(cfg, name=name, train=replace(cfg.train, **options))
        for name, options in (
            ("straight", {"checkpoint_every_s": 0.0}),
            ("saved", {"checkpoint_every": 3}),
            ("stopped", {"checkpoint_every_s": 0.0}),
            ("by_clock", {"checkpoint_every_s": 1e-9}),
        )
    )
    with written_at_once():
        finals = [train(one, runtime, Untracked()).final for one in (straight, saved, by_clock)]
    with asked_to_stop_at(7), pytest.raises(Stopped):
        train(stopped, runtime, Untracked())
    before = load_latest(stopped.folder / "checkpoints")
    finals.append(train(stopped, runtime, Untracked()).final)
    assert finals == [finals[0]] * 4
    expected, *others = (
        load_latest(one.folder / "checkpoints").model_state
        for one in (straight, saved, stopped, by_clock)
    )
    for name, value in expected.items():
        assert all(torch.equal(other[name], value) for other in others), name
    statistics = {name for name in expected if "running" in name}
    assert set(before.extra["buffers"]) == statistics
    for name, values in before.extra["buffers"].items():
        settled = values.mean(0) if arm == "local_avg" else values[0]
        assert_close(before.model_state[name], settled, 1e-12, name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("main", [True, False], ids=["rank 0", "rank 1"])
def test_ranks_save_at_one_step_when_the_clock_of_rank_0_says_so(world_size, tmp_path, main):
    """What they agree on at step 4 they know at 5, and save at the next step at which they agree anyway."""
    cfg, runtime = _config(tmp_path, world_size, agree_every=4), TorchrunRuntime(CPU)
    tracker = _Saves()
    is_due = runtime.is_main == main and (lambda self: self._state.step in (4, 5))
    with patch.object(Saving, "is_due", is_due or (lambda _: False)):
        train(cfg, runtime, tracker)
    assert tracker.steps == ([8, 20] if main else [20]) * runtime.is_main


class _Saves(Untracked):
    """The steps of which a save is reported."""

    def __init__(self):
        self.steps = []

    def event(self, name, **fields):
        if name == "checkpoint":
            self.steps.append(fields["step"])


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("options", "saves"),
    [({}, [6, 12, 18, 20]), ({"eval_every": 3}, [3, 6, 9, 12, 15, 18, 20])],
    ids=["plain", "evaluated"],
)
def test_a_run_that_is_saved_by_the_clock_records_the_same(world_size, tmp_path, options, saves):
    runtime, records = TorchrunRuntime(CPU), []
    for name, every_s in (("alone", 0.0), ("saved", 1e-9)):
        cfg = _config(tmp_path / name, world_size, agree_every=3, **options)
        cfg = replace(cfg, train=replace(cfg.train, checkpoint_every_s=every_s))
        with written_at_once():
            recorded_run(cfg, runtime)
        journal = list(read_journal(cfg.folder / "journal.jsonl"))
        records.append([(r["step"], r["metrics"]) for r in journal if "metrics" in r])
        saved = [r["step"] for r in journal if r.get("event") == "checkpoint"]
        assert saved == (saves if every_s else [20])
    assert records[0] == records[1]


@pytest.mark.world_size(2)
def test_running_statistics_that_differ_are_not_saved(world_size, tmp_path):
    state = build(_config(tmp_path, world_size), TorchrunRuntime(CPU))
    for buffer in state.model.buffers():
        buffer += dist.get_rank()
    with pytest.raises(RanksDisagree, match="running_mean"):
        Saving(state, Untracked()).finish()
    assert load_latest(state.cfg.folder / "checkpoints") is None


@pytest.mark.world_size(2)
def test_running_statistics_that_differ_are_found_before_they_are_made_equal_to_measure(
    world_size, tmp_path
):
    def drift(state, *batch):
        share = real_backward(state, *batch)
        for buffer in state.model.buffers():
            buffer += dist.get_rank()
        return share

    real_backward = loop._backward
    cfg = _config(tmp_path, world_size, steps=3)
    with patch.object(loop, "_backward", drift), pytest.raises(RanksDisagree, match="running_mean"):
        train(cfg, TorchrunRuntime(CPU), Untracked())
    assert load_latest(cfg.folder / "checkpoints") is None


@pytest.mark.world_size(2)
def test_gradients_are_clipped_after_they_are_reduced(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, steps=3)
    cfg = replace(cfg, optim=OptimConfig(lr=0.05, clip_norm=0.1))
    train(cfg, TorchrunRuntime(CPU), Untracked())
    if dist.get_rank() == 0:
        oracle_cfg = replace(cfg, name="oracle", norm=NormConfig(name="big_batch"))
        train(oracle_cfg, Solo(CPU), Untracked())
        ranks, one = (load_latest(c.folder / "checkpoints") for c in (cfg, oracle_cfg))
        for name, value in ranks.model_state.items():
            assert_close(value.double(), one.model_state[name].double(), 1e-9, name)


@pytest.mark.world_size(2)
def test_the_time_limit_of_rank_0_ends_all(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, steps=10_000, time_limit_s=0.2)
    with pytest.raises(OutOfTime):
        train(cfg, TorchrunRuntime(CPU), Untracked())
    assert 0 < load_latest(cfg.folder / "checkpoints").meta.step < 10_000
