"""Checkpoints are copied between two steps, written while training goes on, and made from time to time unasked."""

import itertools
import math
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from saves import written_at_once
from stops import asked_to_stop_at

from syncbn.checkpoint import load_latest
from syncbn.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    config_hash,
    resume_hash,
)
from syncbn.errors import CheckpointError, Stopped
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import loop, recorded_run, saving
from syncbn.train.saving import seconds_between

SOLO = Solo(torch.device("cpu"))
PATIENCE_S = 20.0
"""Bounds a wait that would not end."""


def _config(folder, **train_options) -> RunConfig:
    options = {"steps": 12, "per_rank_batch": 16} | train_options
    return RunConfig(
        runs_dir=str(folder),
        model=ModelConfig(hidden=[16], dropout=0.1),
        data=DataConfig(limit=100),
        train=TrainConfig(**options),
    )


def _saved(cfg) -> list[int]:
    records = read_journal(cfg.folder / "journal.jsonl")
    return [record["step"] for record in records if record.get("event") == "checkpoint"]


@contextmanager
def _held_until(step):
    """The first write ends once `step` has begun; the steps at which a write was begun."""
    reached, begun = threading.Event(), []

    def save(folder, model, optimizer, meta, **options):
        begun.append(meta.step)
        if len(begun) == 1 and not reached.wait(PATIENCE_S):
            raise AssertionError("training did not go on")
        return real_save(folder, model, optimizer, meta, **options)

    def backward(state, *batch):
        if state.step + 1 == step:
            reached.set()
        return real_backward(state, *batch)

    real_save, real_backward = saving.save, loop._backward
    with patch.object(saving, "save", save), patch.object(loop, "_backward", backward):
        yield begun


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "fp16", "ema": 0.9, "accumulate": 2}],
    ids=["plain", "fp16, averages"],
)
def test_what_is_written_while_training_goes_on_is_of_one_step(tmp_path, options):
    """As a run shows that goes on from it: bit by bit as the one that was not saved."""
    optim = OptimConfig(name="adamw", lr=0.01)
    straight = replace(_config(tmp_path / "straight", **options), optim=optim)
    cfg = replace(_config(tmp_path / "saved", checkpoint_every=5, **options), optim=optim)
    whole = recorded_run(straight, SOLO)
    with _held_until(9), asked_to_stop_at(9), pytest.raises(Stopped):
        recorded_run(cfg, SOLO)
    assert _saved(cfg) == [5, 9]
    (cfg.folder / "checkpoints" / "LATEST").write_text("step-000005\n")
    assert recorded_run(cfg, SOLO).final == whole.final
    ours, theirs = (load_latest(c.folder / "checkpoints") for c in (cfg, straight))
    assert _tensors(ours).keys() == _tensors(theirs).keys()
    for name, value in _tensors(theirs).items():
        assert torch.equal(_tensors(ours)[name], value), name
    assert ours.meta.rng == theirs.meta.rng


def _tensors(checkpoint) -> dict[str, torch.Tensor]:
    states = checkpoint.optimizer_state["state"]
    momenta = {f"{n}.{key}": v for n, one in states.items() for key, v in one.items()}
    averages = {f"average {n}": v for n, v in checkpoint.extra.get("ema", {}).items()}
    return {**checkpoint.model_state, **momenta, **averages}


@pytest.mark.parametrize("options", [{}, {"eval_every": 4}], ids=["plain", "evaluated"])
def test_neither_saves_nor_stops_decide_what_a_run_comes_to(tmp_path, options):
    """Its last loss is a mean over steps, which are the same ones."""
    cfg = _config(tmp_path, steps=14, agree_every=5, **options)
    plain, saved, stopped = (replace(cfg, name=name) for name in ("plain", "saved", "stopped"))
    final = recorded_run(plain, SOLO).final
    every_third = replace(saved.train, checkpoint_every=3)
    assert recorded_run(replace(saved, train=every_third), SOLO).final == final
    with asked_to_stop_at(13), pytest.raises(Stopped):
        recorded_run(stopped, SOLO)
    assert recorded_run(stopped, SOLO).final == final


def test_a_save_that_is_due_waits_for_the_one_under_way(tmp_path):
    cfg = _config(tmp_path, checkpoint_every=2)
    with _held_until(4) as begun:
        recorded_run(cfg, SOLO)
    assert begun == [2, 4, 6, 8, 10, 12]
    assert _saved(cfg) == begun


def test_an_evaluation_waits_for_the_write_under_way(tmp_path):
    """Its loaders are forks, which should not find a thread at work."""
    running, real = [], loop.evaluate

    def evaluate(*args):
        running.append([thread.name for thread in threading.enumerate()].count("checkpoint"))
        return real(*args)

    cfg = _config(tmp_path, checkpoint_every=2, eval_every=3)
    with _held_until(3), patch.object(loop, "evaluate", evaluate):
        recorded_run(cfg, SOLO)
    assert running == [0, 0, 0, 0]


@contextmanager
def _failing_at(*steps):
    def save(folder, model, optimizer, meta, **options):
        if meta.step in steps:
            raise CheckpointError(f"cannot save checkpoint {meta.step}: No space left on device")
        return real_save(folder, model, optimizer, meta, **options)

    real_save = saving.save
    with patch.object(saving, "save", save):
        yield


def test_a_write_that_fails_ends_the_run_with_what_it_failed_of(tmp_path):
    cfg = _config(tmp_path, checkpoint_every=5)
    with _failing_at(10), pytest.raises(CheckpointError, match="checkpoint 10: No space") as failed:
        recorded_run(cfg, SOLO)
    assert failed.value.exit_code == 4
    assert load_latest(cfg.folder / "checkpoints").meta.step == 5
    *_, end = read_journal(cfg.folder / "journal.jsonl")
    assert end["status"] == "failed"


@pytest.mark.parametrize("step", [5, 12], ids=["when stopped", "at the end"])
def test_the_last_save_of_an_attempt_must_succeed(tmp_path, step):
    ended = asked_to_stop_at(5) if step == 5 else nullcontext()
    with _failing_at(step), ended, pytest.raises(CheckpointError, match="No space left"):
        recorded_run(_config(tmp_path), SOLO)


def test_a_run_that_is_stopped_is_saved_though_the_write_before_failed(tmp_path):
    cfg, unseen = _config(tmp_path, checkpoint_every=5), patch.object(saving.Saving, "check")
    with _failing_at(5), asked_to_stop_at(6), unseen, pytest.raises(Stopped):
        recorded_run(cfg, SOLO)
    assert load_latest(cfg.folder / "checkpoints").meta.step == 6


def test_a_run_that_fails_leaves_no_write_under_way(tmp_path):
    """Its folder may be another job's from then on."""
    cfg = _config(tmp_path, checkpoint_every=5)

    def fail(state, *batch):
        if state.step == 6:
            raise ValueError("a bug")
        return real(state, *batch)

    real = loop._backward
    failing = patch.object(loop, "_backward", fail)
    with failing, _held_until(7), pytest.raises(ValueError, match="a bug"):
        recorded_run(cfg, SOLO)
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    assert _saved(cfg) == [5]


# By the clock


@pytest.mark.parametrize(
    ("options", "cost_s", "expected_s"),
    [
        ({}, 0.0, 5.0),
        ({}, 1.0, 100.0),
        ({}, 60.0, 300.0),
        ({"checkpoint_every_s": 5.0}, 1.0, 5.0),
        ({"checkpoint_every_s": 0.0}, 0.0, math.inf),
        ({"checkpoint_every": 100}, 0.0, math.inf),
        ({"checkpoint_every": 100, "checkpoint_every_s": 5.0}, 0.0, 5.0),
    ],
)
def test_saves_take_a_hundredth_of_the_time_within_bounds_unless_told(options, cost_s, expected_s):
    assert seconds_between(TrainConfig(**options), cost_s) == pytest.approx(expected_s)


def test_how_often_a_run_is_saved_is_not_part_of_its_hash(tmp_path):
    plain, saved = (_config(tmp_path, checkpoint_every_s=every_s) for every_s in (None, 5.0))
    assert (config_hash(plain), resume_hash(plain)) == (config_hash(saved), resume_hash(saved))


@pytest.fixture
def clock(monkeypatch):
    """The time by which saves are made, in seconds: it passes by `a_step` with each, `of_a_write` in a thread."""
    clock = SimpleNamespace(now=0.0, a_step=1.0, of_a_write=0.0)
    in_thread = itertools.count()

    def backward(state, *batch):
        clock.now += clock.a_step
        return real(state, *batch)

    real = loop._backward
    monkeypatch.setattr(loop, "_backward", backward)
    times = SimpleNamespace(
        monotonic=lambda: clock.now, thread_time=lambda: next(in_thread) * clock.of_a_write
    )
    monkeypatch.setattr(saving, "time", times)
    return clock


@pytest.fixture
def at_once():
    with written_at_once():
        yield


def test_a_run_left_alone_is_saved_from_time_to_time_where_ranks_agree(tmp_path, clock, at_once):
    clock.a_step = 1.0
    cfg = _config(tmp_path, steps=20, agree_every=3)
    recorded_run(cfg, SOLO)
    assert _saved(cfg) == [6, 12, 18, 20]


def test_a_run_whose_saves_cost_more_is_saved_less_often(tmp_path, clock, at_once):
    clock.of_a_write = 0.5
    cfg = _config(tmp_path, steps=100, agree_every=3)
    recorded_run(cfg, SOLO)
    assert _saved(cfg) == [6, 57, 100]


@pytest.mark.parametrize("options", [{"steps": 4}, {"checkpoint_every_s": 0.0}])
def test_a_short_run_and_one_that_is_told_so_are_saved_at_the_end_alone(tmp_path, clock, options):
    cfg = _config(tmp_path, **{"steps": 80, "agree_every": 1} | options)
    recorded_run(cfg, SOLO)
    assert _saved(cfg) == [cfg.train.steps]


def test_no_save_by_the_clock_is_begun_while_one_is_under_way(tmp_path, clock):
    cfg = _config(tmp_path, agree_every=1, checkpoint_every_s=1.0)
    with _held_until(7) as begun:
        recorded_run(cfg, SOLO)
    first, second, *_ = begun
    assert first == 1
    assert second >= 7


def test_any_save_counts_for_the_clock(tmp_path, clock, at_once):
    cfg = _config(tmp_path, agree_every=1, checkpoint_every=5, checkpoint_every_s=4.0)
    recorded_run(cfg, SOLO)
    assert _saved(cfg) == [4, 5, 9, 10, 12]
