"""Callbacks of extensions: when they are called, what they may do, and how they fail."""

import random
import re

import numpy as np
import pytest
import torch

from syncbn.callbacks import Callback
from syncbn.checkpoint import load_latest
from syncbn.compose import compose, vary
from syncbn.config import config_hash
from syncbn.errors import SyncbnError, UsageError, exit_code
from syncbn.registry import CALLBACKS
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import recorded_run

SOLO = Solo(torch.device("cpu"))
TINY = ["model.hidden=[8]", "data.limit=64", "train.per_rank_batch=16", "train.steps=6"]
SEEN: list[tuple[str, int]] = []


class Counter(Callback):
    """Counts steps over all attempts, records the count, stops at one, and fails at a moment."""

    def __init__(self, *, stop_at: int = 0, fail_in: str = "") -> None:
        self.stop_at, self.fail_in, self.count = stop_at, fail_in, 0
        for what in ("start", "after_step", "after_evaluation", "end"):
            setattr(self, what, lambda moment, what=what: self._see(what, moment))

    def _see(self, what, moment) -> None:
        SEEN.append((what, moment.step))
        if what == self.fail_in:
            raise KeyError("lost\nthread")
        if what == "after_step":
            self.count += 1
            moment.record(count=self.count)
            if moment.step == self.stop_at:
                moment.stop()

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state) -> None:
        self.count = state["count"]


class Drawing(Callback):
    """Draws from every global generator whenever it is called."""

    def __init__(self) -> None:
        self.drawn: list[float] = []
        DRAWN.append(self.drawn)
        self._draw(None)
        for what in ("start", "after_step", "after_evaluation", "end"):
            setattr(self, what, self._draw)

    def _draw(self, moment) -> None:
        self.drawn += [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002

    def state_dict(self) -> dict[str, int]:
        self._draw(None)
        return {}


DRAWN: list[list[float]] = []


def _alien() -> dict:
    return {}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(CALLBACKS, "_entries", {})
    CALLBACKS.register("counter")(Counter)
    CALLBACKS.register("alien")(_alien)
    CALLBACKS.register("drawing")(Drawing)
    SEEN.clear()
    DRAWN.clear()


def _config(folder, *overrides: str):
    return compose([*TINY, f"runs_dir={folder}", *overrides])


def test_callbacks_are_called_at_each_moment_and_record(tmp_path):
    cfg = _config(tmp_path, "callbacks.counter={}", "train.eval_every=3")
    recorded_run(cfg, SOLO)
    steps = [("after_step", step) for step in range(1, 7)]
    evaluations = [("after_evaluation", 3), ("after_evaluation", 6)]
    expected = [("start", 0), *steps[:3], evaluations[0], *steps[3:], evaluations[1], ("end", 6)]
    assert expected == SEEN
    records = read_journal(cfg.folder / "journal.jsonl")
    counts = [r["metrics"]["count"] for r in records if "count" in r.get("metrics", {})]
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("save_every", [0, 3])
def test_a_callback_ends_a_run_well_where_ranks_agree(tmp_path, save_every):
    saving = f"train.checkpoint_every={save_every}"
    cfg = _config(tmp_path, "callbacks.counter.stop_at=3", "train.agree_every=2", saving)
    summary = recorded_run(cfg, SOLO)
    assert summary.steps == 4
    assert "test_error" in summary.final


def test_a_resumed_run_continues_a_callback(tmp_path):
    cfg = _config(tmp_path, "callbacks.counter={}", "train.checkpoint_every=2")
    recorded_run(cfg, SOLO)
    checkpoints = cfg.folder / "checkpoints"
    for path in checkpoints.glob("step-000006/*"):
        path.unlink()
    (cfg.folder / "summary.json").unlink()
    recorded_run(cfg, SOLO)
    records = list(read_journal(cfg.folder / "journal.jsonl"))
    assert [r["metrics"]["count"] for r in records if "count" in r.get("metrics", {})][-1] == 6


def test_a_callback_that_draws_changes_no_bit_and_draws_the_same_again(tmp_path):
    settings = ["model.dropout=0.5", "train.checkpoint_every=2", "train.eval_every=2"]
    names = ("plain", "drawn", "again")
    runs = [
        _config(
            tmp_path,
            *settings,
            f"name={name}",
            *(["callbacks.drawing={}"] if name != "plain" else []),
        )
        for name in names
    ]
    plain, *drawn = (_numbers(cfg) for cfg in runs)
    assert drawn == [plain, plain]
    first, second = DRAWN
    assert first == second
    assert len(set(first)) == len(first)


def _numbers(cfg) -> list:
    recorded_run(cfg, SOLO)
    records = read_journal(cfg.folder / "journal.jsonl")
    return [(r["step"], r["metrics"]) for r in records if "metrics" in r]


def test_a_callback_that_fails_at_the_end_loses_no_step(tmp_path):
    cfg = _config(tmp_path, "callbacks.counter.fail_in=end")
    with pytest.raises(UsageError, match="failed in end"):
        recorded_run(cfg, SOLO)
    assert load_latest(cfg.folder / "checkpoints").meta.step == cfg.train.steps


def test_callbacks_and_their_options_are_part_of_a_run(tmp_path):
    plain = _config(tmp_path)
    one = vary(plain, ["callbacks.counter.stop_at=0"])
    assert one.callbacks == {"counter": {"stop_at": 0, "fail_in": ""}}
    two = vary(plain, ["callbacks.counter.stop_at=2"])
    assert len({config_hash(cfg) for cfg in (plain, one, two)}) == 3


BAD = {
    "callbacks.conter={}": "callbacks.conter is not a callback of an extension: did you mean 'counter'",
    "callbacks.counter=3": "callbacks.counter=3 is not allowed: its options by name",
    "callbacks.counter.stop=3": "callbacks.counter.stop is not an option of callback counter; did you mean 'stop_at'",
    "callbacks.counter.stop_at=soon": "callbacks.counter.stop_at='soon' is not allowed: of type int",
    "callbacks=[counter]": "callbacks takes names, each with its options",
    "callbacks.alien={}": "callback alien is a dict: derive it from syncbn.extend.Callback",
} | {
    f"callbacks.counter.fail_in={what}": rf"callback counter failed in {what} at test_callbacks.py:\d+ on rank 0 "
    r"\(KeyError: 'lost\\nthread'\)"
    for what in ("start", "after_step", "after_evaluation", "end")
}


@pytest.mark.parametrize("override", BAD)
def test_a_callback_that_cannot_be_used_ends_with_one_line(tmp_path, override):
    with pytest.raises(SyncbnError, match=BAD[override]) as raised:
        recorded_run(_config(tmp_path, override), SOLO)
    assert exit_code(raised.value) == 2
    assert not re.search("\n", str(raised.value))
