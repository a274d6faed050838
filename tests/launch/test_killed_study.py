"""A study that was killed, and run again, comes to the same summary as one that was not."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from programs import COMPARE, Bench, wait_until

STUDY = (
    "study=batch_size",
    "data=digits",
    "model.hidden=[64]",
    "tracking=journal",
    "train.steps=120",
    "train.eval_every=40",
    "train.agree_every=20",
    "train.progress=false",
    "study.seeds=[0,1]",
    "study.tune.seeds=[1000]",
    "study.tune.values=[0.03,0.1]",
    "launcher.processes=2",
)
TIMES = {"seconds"}
MOMENTS = 3


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_study_killed_at_random_moments_comes_to_the_summary_of_one_that_was_not(bench, tmp_path):
    whole = bench.run(*COMPARE, *STUDY, "runs_dir=whole", timeout=1000)
    assert whole.returncode == 0, whole.stderr
    moments = random.SystemRandom()
    for _ in range(MOMENTS):
        _killed_after(bench, moments.uniform(0.0, 1.0))
        assert not bench.left_running()
    again = bench.run(*COMPARE, *STUDY, "runs_dir=cut", timeout=1000)
    assert again.returncode == 0, again.stderr
    assert _summary(tmp_path / "cut") == _summary(tmp_path / "whole")


def _killed_after(bench: Bench, share: float) -> None:
    """Start the study in `cut`, and kill all its processes once a random number of files have come."""
    folder = bench.folder / "cut" / "batch_size"
    wanted = _num_finished(folder) + round(6 * share)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with bench.start(*COMPARE, *STUDY, "runs_dir=cut", **silent) as process:
        wait_until(lambda: _num_finished(folder) >= wanted or process.poll() is not None)
        time.sleep(0.3 * share)  # somewhere in a trial
        bench.kill_all()  # as a machine that loses its power


def _num_finished(folder: Path) -> int:
    return len(list(folder.glob("*/*/summary.json")))


def _summary(runs: Path) -> dict:
    """The study's summary, times apart."""
    summary = json.loads((runs / "batch_size" / "summary.json").read_text())
    for measured in summary["arms"].values():
        for metric in TIMES:
            measured.pop(metric)
    return summary
