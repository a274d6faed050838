"""What may be another in the settings of a run that goes on, and what is refused by name."""

import json

import pytest
import torch

from syncbn.compose import compose
from syncbn.errors import CheckpointError, UsageError
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import recorded_run

SOLO = Solo(torch.device("cpu"))
TINY = [
    "model.hidden=[8]",
    "data.limit=64",
    "train.per_rank_batch=16",
    "train.steps=6",
    "optim.schedule=constant",
]


@pytest.fixture
def config(tmp_path):
    def composed(*overrides: str):
        return compose([*TINY, "tracking=journal", f"runs_dir={tmp_path}", *overrides])

    return composed


def stopped_at_3(cfg):
    """Train the run of `cfg`, and leave of it what a kill after step 3 would."""
    recorded_run(cfg, SOLO)
    folder = cfg.folder / "checkpoints"
    for path in folder.glob("step-000006/*"):
        path.unlink()
    (folder / "step-000006").rmdir()
    (folder / "LATEST").write_text("step-000003\n")
    (cfg.folder / "summary.json").unlink()


def losses(cfg) -> dict[int, float]:
    records = read_journal(cfg.folder / "journal.jsonl")
    return {
        r["step"]: r["metrics"]["train_loss"]
        for r in records
        if "train_loss" in r.get("metrics", {})
    }


SAVING = ("train.checkpoint_every=3", "train.log_every=1")
FREE = {
    "train.log_every=2": "train.log_every was 1, is 2",
    "train.eval_every=2": "train.eval_every was 0, is 2",
    "train.agree_every=2": "train.agree_every was 10, is 2",
    "train.steps=8": "train.steps was 6, is 8",
}


@pytest.mark.slow_if(lambda override, **_: override in ("train.log_every=2", "train.eval_every=2"))
@pytest.mark.parametrize("override", FREE)
def test_what_changes_no_number_may_change(config, override):
    whole = recorded_run(config("name=whole", *SAVING, override, "train.log_every=1"), SOLO)
    stopped_at_3(config("name=cut", *SAVING))
    cut = config("name=cut", *SAVING, override)
    final = recorded_run(cut, SOLO).final
    assert {k: v for k, v in final.items() if k != "train_loss"} == {
        k: v for k, v in whole.final.items() if k != "train_loss"
    }
    logged = losses(cut)
    assert logged == {step: losses(config("name=whole"))[step] for step in logged}
    (resumed,) = [
        r for r in read_journal(cut.folder / "journal.jsonl") if r.get("event") == "resume"
    ]
    assert resumed["step"] == 3
    assert resumed["notes"] == [f"resuming with another setting: {FREE[override]}"]


def test_two_settings_may_change_one_after_the_other_and_back(config):
    stopped_at_3(config("name=cut", *SAVING))
    recorded_run(config("name=cut", *SAVING, "train.log_every=2"), SOLO)
    recorded_run(config("name=cut", *SAVING, "train.steps=8"), SOLO)
    assert recorded_run(config("name=cut", *SAVING, "train.steps=9"), SOLO).steps == 9


REFUSED = {
    "optim.lr=0.5": "optim.lr was 0.05, is 0.5",
    "model.hidden=[9]": r"model.hidden was \[8\], is \[9\]",
    "seed=1": "seed was 0, is 1",
    "train.steps=2": "train.steps was 6, is 2",
    "train.patience=1 train.eval_every=1": "train.eval_every was 0, is 1; train.patience was None, is 1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_decides_numbers_is_refused_by_name_in_a_run_that_goes_on(config, override):
    stopped_at_3(config(*SAVING))
    with pytest.raises(
        CheckpointError, match=f"was made with other settings: {REFUSED[override]}: give"
    ):
        recorded_run(config(*SAVING, *override.split()), SOLO)


def test_more_steps_are_refused_where_the_schedule_spreads_over_them(config):
    stopped_at_3(config(*SAVING, "optim.schedule=cosine"))
    with pytest.raises(
        CheckpointError,
        match=r"train.steps was 6, is 8 \(over which optim.schedule=cosine spreads\)",
    ):
        recorded_run(config(*SAVING, "optim.schedule=cosine", "train.steps=8"), SOLO)


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_not_finished(config):
    whole = recorded_run(config("name=whole", "train.steps=9"), SOLO)
    recorded_run(config("name=longer"), SOLO)
    longer = recorded_run(config("name=longer", "train.steps=9"), SOLO)
    assert longer.steps == 9
    assert longer.final["test_error"] == whole.final["test_error"]
    assert longer.final["test_loss"] == whole.final["test_loss"]


def test_a_finished_run_is_done_whatever_changes_no_number_and_else_refused_by_name(config):
    done = recorded_run(config(), SOLO)
    assert recorded_run(config("train.log_every=2"), SOLO) == done
    with pytest.raises(UsageError, match=r"holds a finished run with other settings: optim.lr was"):
        recorded_run(config("optim.lr=0.5"), SOLO)


def test_without_a_journal_the_hashes_are_named(config):
    cfg = config(*SAVING)
    stopped_at_3(cfg)
    lines = (cfg.folder / "journal.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["event"] == "start"
    (cfg.folder / "journal.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(CheckpointError, match=r"was made with config [0-9a-f]{12}, this run has"):
        recorded_run(config(*SAVING, "optim.lr=0.5"), SOLO)
