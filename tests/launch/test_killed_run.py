"""A run whose processes are killed goes on bit by bit from its newest checkpoint, whatever state it carries."""

import json

import pytest
import torch
from programs import SYNCBN, losses, wait_until

from syncbn.checkpoint import load_latest

RUN = (
    "train",
    "name=it",
    "model=cnn",
    "model.width=4",
    "data.limit=200",
    "train.steps=60",
    "train.per_rank_batch=4",
    "train.accumulate=2",
    "train.precision=fp16",
    "train.ema=0.9",
    "train.eval_every=10",
    "train.keep_best=true",
    "train.agree_every=1",
    "train.progress=false",
    "optim.clip_norm=1",
    "optim.groups={*.bias:{lr_scale:0.5}}",
    "launcher.num_workers=2",
    "tracking=journal",
)
TIMES = {"seconds"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signalled", "saves"),
    [
        ("every process", "train.checkpoint_every=5"),
        ("every process", "train.checkpoint_every_s=0.001"),
        ("the ranks' launcher", "train.checkpoint_every=5"),
    ],
)
def test_a_killed_run_with_a_loss_scale_averages_and_accumulation_goes_on(
    bench, tmp_path, signalled, saves
):
    whole = bench.run(*SYNCBN, *RUN, "runs_dir=whole")
    assert whole.returncode == 0, whole.stderr
    with bench.start(*SYNCBN, *RUN, "runs_dir=cut", saves) as process:
        journal = tmp_path / "cut" / "it" / "journal.jsonl"
        wait_until(lambda: journal.exists() and len(losses(journal.parent)) > 22)
        if signalled == "every process":
            bench.kill_all()
        else:
            process.kill()
    assert not bench.left_running()
    kept = load_latest(tmp_path / "cut" / "it" / "checkpoints").meta.step
    assert 0 < kept < 60
    again = bench.run(*SYNCBN, *RUN, "runs_dir=cut")
    assert again.returncode == 0, again.stderr
    assert _final(tmp_path / "cut") == _final(tmp_path / "whole")
    assert dict(losses(tmp_path / "cut" / "it")) == dict(losses(tmp_path / "whole" / "it"))
    ours, theirs = (load_latest(tmp_path / one / "it" / "checkpoints") for one in ("cut", "whole"))
    for name, value in theirs.model_state.items():
        assert torch.equal(ours.model_state[name], value), name
    for name, average in theirs.extra["ema"].items():
        assert torch.equal(ours.extra["ema"][name], average), name


def _final(runs):
    summary = json.loads((runs / "it" / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in TIMES}
