"""Runs that faults happen to end as they would have undisturbed; and what looks for that can see a difference."""

import json
import shutil

import fault_plans
import observations
import pytest
from chaos import KINDS, SETTINGS, STEPS
from faulted_run import run_under

from syncbn.tracking import Journal


def test_a_plan_is_decided_by_its_seed():
    def planned(seed):
        return fault_plans.plan(seed, ("kill rank", "stop rank"), 5, steps=100, num_ranks=2)

    assert planned(3) == planned(3) != planned(4)
    assert [fault.step for fault in planned(3)] == sorted({fault.step for fault in planned(3)})
    assert {fault.rank for seed in range(5) for fault in planned(seed)} == {0, 1}
    assert set().union(*KINDS.values()) <= set(fault_plans.KINDS)


@pytest.fixture
def recorded(tmp_path):
    """The files of a run of two steps on one rank."""
    folder = tmp_path / "whole"
    checkpoint = folder / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (folder / "checkpoints" / "LATEST").write_text("step-2\n")
    journal = Journal(folder / "journal.jsonl")
    journal.begin(0)
    for step in (1, 2):
        journal.metrics(step, {"train_loss": 1.0 / step})
    journal.close()
    write_steps(folder, [(1, "a"), (2, "b")])
    return folder


def write_steps(folder, steps):
    path = folder / "observed" / "rank-0.jsonl"
    path.parent.mkdir(exist_ok=True)
    records = [{"pid": 1, "time": 0.0}]
    records += [{"step": step, "samples": [sample], "time": float(step)} for step, sample in steps]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda _: None, []),
        (lambda f: write_steps(f, [(1, "a"), (2, "b"), (2, "b")]), []),
        (lambda f: write_steps(f, [(1, "a"), (2, "c"), (2, "b")]), ["samples of rank 0"]),
        (lambda f: write_steps(f, [(1, "a")]), ["steps of rank 0"]),
        (lambda f: (f / "journal.jsonl").write_text(""), ["losses"]),
        (lambda f: (f / "checkpoints/step-2/model.safetensors").write_bytes(b""), ["parameters"]),
    ],
    ids=["none", "a step again", "another sample", "a step less", "a loss", "a parameter"],
)
def test_a_difference_is_found(change, found, recorded, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(recorded, other)
    change(other)
    assert observations.differences(other, recorded, num_ranks=1) == found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", KINDS)
def test_runs_end_as_they_would_have_undisturbed(launcher, bench):
    whole = run_under(bench, launcher, "whole", SETTINGS)
    assert (whole.code, whole.left) == (0, [])
    for seed in range(3):
        faults = fault_plans.plan(seed, KINDS[launcher], 2, STEPS, num_ranks=2)
        outcome = run_under(bench, launcher, f"seed-{seed}", SETTINGS, faults)
        assert outcome.code == 0, (bench.folder / "output.log").read_text()
        assert observations.differences(outcome.folder, whole.folder, num_ranks=2) == []
        assert outcome.left == []
        by_hand = sum(fault.kind in fault_plans.BY_HAND for fault in outcome.happened)
        assert outcome.again <= by_hand, "a run goes on by itself where it can"
