"""The training loop in one process: when it ends, what it writes, how it resumes."""

import itertools
import json
import math
import signal
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from syncbn.checkpoint import load_latest
from syncbn.config import DataConfig, ModelConfig, NormConfig, OptimConfig, RunConfig, TrainConfig
from syncbn.errors import CheckpointError, DataError, NonFinite, OutOfTime, Stopped, UsageError
from syncbn.optim import learning_rate
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import loop, recorded_run, stopping
from syncbn.train.stopping import ended_by_signals, stop_on_signals

SOLO = Solo(torch.device("cpu"))


def _config(folder, **train_options) -> RunConfig:
    options = {"steps": 12, "per_rank_batch": 16} | train_options
    return RunConfig(
        runs_dir=str(folder),
        model=ModelConfig(hidden=[16]),
        data=DataConfig(limit=100),
        train=TrainConfig(**options),
    )


def _metrics(cfg, name):
    records = read_journal(cfg.folder / "journal.jsonl")
    return {r["step"]: r["metrics"][name] for r in records if name in r.get("metrics", {})}


def test_the_journal_has_true_steps_losses_rates_and_evaluations(tmp_path):
    cfg = _config(tmp_path, log_every=3, eval_every=5)
    summary = recorded_run(cfg, SOLO)
    assert list(_metrics(cfg, "train_loss")) == [3, 6, 9, 12]
    assert list(_metrics(cfg, "test_error")) == [5, 10, 12]
    expected = {step: learning_rate(step - 1, cfg.optim, 12, 16) for step in (3, 6, 9, 12)}
    assert _metrics(cfg, "lr") == expected
    assert _metrics(cfg, "test_error")[12] == summary.final["test_error"]
    first, *_, last = read_journal(cfg.folder / "journal.jsonl")
    assert first["event"] == "start"
    assert first["attempt"] == 1
    assert first["config"]["train"]["steps"] == 12
    assert last["status"] == "finished"
    assert last["summary"] == json.loads((cfg.folder / "summary.json").read_text())


def test_the_journal_holds_no_password(tmp_path):
    cfg = _config(tmp_path)
    cfg.tracking.uri = "http://user:hunter2@127.0.0.1:5000"
    recorded_run(cfg, SOLO)
    assert "hunter2" not in (cfg.folder / "journal.jsonl").read_text()


def test_training_learns(tmp_path):
    cfg = _config(tmp_path, steps=150)
    summary = recorded_run(replace(cfg, data=DataConfig()), SOLO)
    assert summary.final["test_error"] < 0.15


def test_the_same_config_gives_the_same_numbers(tmp_path):
    one, other = (recorded_run(_config(tmp_path / part), SOLO) for part in "ab")
    assert one.final == other.final
    assert one.config_hash == other.config_hash


def test_another_seed_gives_other_numbers(tmp_path):
    one, other = (recorded_run(replace(_config(tmp_path / str(s)), seed=s), SOLO) for s in (0, 1))
    assert one.final != other.final


@pytest.mark.parametrize("augment", [False, True], ids=["as is", "augmented"])
def test_resuming_continues_bit_for_bit(tmp_path, augment):
    data = DataConfig(limit=100, augment=augment)
    straight = replace(_config(tmp_path / "straight"), data=data)
    recorded_run(straight, SOLO)
    cfg = replace(_config(tmp_path / "resumed", checkpoint_every=5), data=data)
    recorded_run(cfg, SOLO)
    (cfg.folder / "summary.json").unlink()
    (cfg.folder / "checkpoints" / "LATEST").write_text(
        "step-000010\n"
    )  # as if killed after step 10
    recorded_run(cfg, SOLO)
    assert _metrics(cfg, "train_loss") == _metrics(straight, "train_loss")
    ours, theirs = (load_latest(c.folder / "checkpoints") for c in (cfg, straight))
    assert all(torch.equal(v, theirs.model_state[k]) for k, v in ours.model_state.items())
    starts = [r for r in read_journal(cfg.folder / "journal.jsonl") if r.get("event") == "start"]
    assert [r["attempt"] for r in starts] == [1, 2]


def test_a_finished_run_is_not_trained_again_unless_told(tmp_path):
    cfg = _config(tmp_path)
    first, trained = recorded_run(cfg, SOLO), []
    with _before_step(12, lambda: trained.append(True)):
        assert recorded_run(cfg, SOLO) == first
        assert not trained
        again = recorded_run(_config(tmp_path, resume=False), SOLO)
    assert trained
    assert again.final == first.final
    assert len(_metrics(cfg, "train_loss")) == 12


def test_a_folder_of_another_config_is_refused(tmp_path):
    recorded_run(_config(tmp_path), SOLO)
    with pytest.raises(UsageError, match="another name"):
        recorded_run(_config(tmp_path, steps=13), SOLO)
    (tmp_path / "run" / "summary.json").unlink()
    journal = (tmp_path / "run" / "journal.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="another name"):
        recorded_run(_config(tmp_path, steps=13), SOLO)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == journal


def test_a_run_whose_summary_is_cut_off_is_finished_again(tmp_path):
    cfg = _config(tmp_path)
    recorded_run(cfg, SOLO)
    (cfg.folder / "summary.json").write_text('{"final": {')
    assert recorded_run(cfg, SOLO).steps == 12


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"target_error": 1.0, "eval_every": 4}, 4),
        ({"patience": 1, "eval_every": 1}, None),
    ],
    ids=["target reached", "patience over"],
)
def test_a_run_that_ends_early_at_its_target_or_without_progress_is_evaluated(
    tmp_path, options, steps
):
    cfg = _config(tmp_path, steps=400, **options)
    summary = recorded_run(cfg, SOLO)
    assert summary.steps < 400
    assert steps is None or summary.steps == steps
    assert list(_metrics(cfg, "test_error"))[-1] == summary.steps
    assert load_latest(cfg.folder / "checkpoints").meta.step == summary.steps


def test_a_run_out_of_time_is_interrupted_and_goes_on_where_it_was(tmp_path):
    straight, cfg = (_config(tmp_path / part, agree_every=2) for part in ("straight", "late"))
    recorded_run(straight, SOLO)
    cfg.train.time_limit_s = 1e-6
    with pytest.raises(OutOfTime, match="after 2 of 12 steps, checkpoint saved") as over:
        recorded_run(cfg, SOLO)
    assert over.value.exit_code == 75
    assert not (cfg.folder / "summary.json").exists()
    *_, end = read_journal(cfg.folder / "journal.jsonl")
    assert end["status"] == "stopped"
    cfg.train.time_limit_s = None
    assert recorded_run(cfg, SOLO).steps == 12
    assert _metrics(cfg, "train_loss") == _metrics(straight, "train_loss")


def test_the_seconds_of_a_run_are_those_of_all_its_attempts(tmp_path, monkeypatch):
    seconds = itertools.count()  # each look at the clock finds it a second later
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    cfg = _config(tmp_path, agree_every=2, time_limit_s=0.5)
    with pytest.raises(OutOfTime):
        recorded_run(cfg, SOLO)
    first = load_latest(cfg.folder / "checkpoints").extra["seconds"]
    cfg.train.time_limit_s = None
    assert first > 0
    assert recorded_run(cfg, SOLO).seconds == first + 1


def test_a_last_step_that_comes_too_late_is_still_the_last(tmp_path):
    cfg = _config(tmp_path, agree_every=12, time_limit_s=1e-6)
    assert recorded_run(cfg, SOLO).steps == 12


def test_a_signal_at_a_step_due_for_evaluation_loses_none(tmp_path):
    straight, cfg = (_config(tmp_path / part, eval_every=4) for part in ("straight", "stopped"))
    recorded_run(straight, SOLO)
    with _before_step(4, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Stopped):
        recorded_run(cfg, SOLO)
    assert list(_metrics(cfg, "test_error")) == [4]
    recorded_run(cfg, SOLO)
    assert _metrics(cfg, "test_error") == _metrics(straight, "test_error")
    ours, theirs = (load_latest(c.folder / "checkpoints").extra for c in (cfg, straight))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}


@contextmanager
def _before_step(step, happens):
    """Call `happens` before the backward pass of `step`, and so before its agreement."""

    def backward(state, *batch):
        if state.step == step - 1:
            happens()
        return real_backward(state, *batch)

    real_backward = loop._backward
    with patch.object(loop, "_backward", backward):
        yield


def test_divergence_is_an_error_in_the_journal_too(tmp_path):
    cfg = replace(
        _config(tmp_path), norm=NormConfig("none"), optim=OptimConfig(lr=1e30, momentum=0.0)
    )
    with pytest.raises(NonFinite):
        recorded_run(cfg, SOLO)
    *_, end = read_journal(cfg.folder / "journal.jsonl")
    assert end["status"] == "failed"
    assert "NonFinite" in end["error"]
    assert not (cfg.folder / "summary.json").exists()


def test_too_few_values_for_a_norm_behind_poolings_are_a_usage_error(tmp_path):
    cfg = _config(tmp_path, per_rank_batch=1)
    cfg = replace(cfg, norm=NormConfig("local"), model=ModelConfig(name="vgg", width=4))
    cfg = replace(cfg, data=DataConfig(name="synthetic", image_size=4, num_samples=16))
    with pytest.raises(UsageError, match=r"1 sample\(s\) on rank 0 are too few for norm=local"):
        recorded_run(cfg, SOLO)


def test_more_ranks_than_the_runtime_has_are_refused(tmp_path):
    cfg = _config(tmp_path)
    cfg.launcher.num_workers = 2
    with pytest.raises(UsageError, match=r"2 rank\(s\), but 1"):
        recorded_run(cfg, SOLO)


def test_one_process_takes_the_whole_global_batch_as_big_batch(tmp_path):
    cfg = replace(_config(tmp_path), norm=NormConfig("big_batch"))
    cfg.launcher.num_workers = 4
    recorded_run(cfg, SOLO)
    assert load_latest(cfg.folder / "checkpoints").meta.position == 12 * 64


def test_too_few_samples_for_a_batch_are_a_data_error(tmp_path):
    with pytest.raises(DataError, match="100 samples, fewer than one global batch of 128"):
        recorded_run(_config(tmp_path, per_rank_batch=128), SOLO)


def test_losses_are_numbers(tmp_path):
    cfg = _config(tmp_path)
    recorded_run(cfg, SOLO)
    assert all(math.isfinite(loss) for loss in _metrics(cfg, "train_loss").values())


@pytest.fixture
def clock(monkeypatch):
    """What the handler of signals takes for the time, in seconds: `clock.now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_first_signal_asks_and_handlers_come_back(clock):
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the launcher passes the same one on
        assert stop.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (2, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 143),
        (signal.SIGUSR1, 143),
        (signal.SIGUSR2, 143),
    ],
)
def test_what_closes_a_terminal_or_warns_of_a_time_limit_stops_as_sigterm_does(number, code):
    with stop_on_signals() as stop:
        signal.raise_signal(number)
    assert Stopped(stop.signal_number).exit_code == code


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal_number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_that_is_not_the_first_passed_on_ends_the_process(clock, monkeypatch):
    raised, restored = [], []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    monkeypatch.setattr(signal, "signal", lambda *handler: restored.append(handler))
    stop = stopping.StopRequest()
    stop.ask(signal.SIGINT, None)
    clock.now += stopping.REPEAT_S
    stop.ask(signal.SIGINT, None)
    assert not raised
    clock.now += 0.1
    stop.ask(signal.SIGINT, None)
    assert (restored, raised) == ([(signal.SIGINT, signal.SIG_DFL)], [signal.SIGINT])


def test_a_rank_that_waits_for_others_to_start_is_ended_by_a_signal_at_once():
    with stop_on_signals() as stop:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == stop.ask
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), ended_by_signals():
            pass
