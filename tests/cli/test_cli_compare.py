"""The verbs that read studies, as a user meets them: `advise`, `compare-to`."""

import json

import pytest
from programs import complaint

TINY = ("debug=tiny", "study.seeds=[0,1]", "launcher.processes=1", "launcher.num_workers=4")


def write(folder, errors, **design):
    """A finished study of two ranks: arm -> test error under each of six seeds."""
    basis = {"data": "digits", "model": "mlp", "world_size": 2, "per_rank_batch": 2, "steps": 600,
             "seeds": list(range(6)), "split": "test", "virtual": True}  # fmt: skip
    arms = {arm: {"test_error": values, "world_size": [1] * 6} for arm, values in errors.items()}
    summary = {
        "study": "demo",
        "git": "abc",
        "versions": {},
        "design": basis | design,
        "arms": arms,
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | {"claims": []}))
    return str(folder)


LOCAL = [0.40, 0.41, 0.39, 0.42, 0.40, 0.38]
SYNC = [0.060, 0.062, 0.059, 0.061, 0.058, 0.060]


def test_advice_runs_a_study_over_all_groups_and_answers_on_stdout_alone(bench):
    result = bench.call("advise", *TINY, "--no-cost", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [group["size"] for group in found["groups"]] == [1, 2, 4]
    assert found["cost"] is None
    again = bench.call("advise", "--from", "runs/advise")
    assert again.stdout.startswith(found["verdict"])
    assert "study=cost" in again.stdout


def test_advice_from_a_study_takes_the_cost_from_the_one_beside_it(bench):
    folder = write(bench.folder / "runs" / "mine", {"local": LOCAL, "sync": SYNC})
    cost = bench.folder / "runs" / "mine-cost"
    write(cost, {"local": LOCAL, "sync": SYNC}, virtual=False)
    summary = json.loads((cost / "summary.json").read_text())
    for arm, ms in (("local", 2.0), ("sync", 3.0)):
        summary["arms"][arm]["step_ms"] = [ms] * 6
    (cost / "summary.json").write_text(json.dumps(summary))
    found = json.loads(bench.call("advise", "--from", folder, "--json").stdout)
    assert found["verdict"] == "SYNCHRONISE"
    assert found["cost"]["ratio"]["median"] == pytest.approx(1.5)


def test_a_plan_of_advice_starts_nothing(bench):
    result = bench.call("advise", "launcher.num_workers=512", "--dry-run", "--json")
    (plan,) = json.loads(result.stdout)  # no study of cost: no machine of ours has the cores
    assert "group_256-0" in plan["trials"]
    assert not list(bench.folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launcher.num_workers=1"], "nothing to synchronise"),
        (["study=demo"], "a study of its own"),
        (["launcher.num_workers=2", "--margin", "0"], "--margin"),
        (["--from", "nowhere"], "holds no finished study"),
        (["--from", "nowhere", "seed=1"], "takes no settings"),
        (["launcher.num_workers=2", "train.per_rank_batch=1"], "one by one"),
    ],
)
def test_advice_on_an_unfit_study_is_refused_at_once(bench, arguments, said):
    result = bench.call("advise", *arguments)
    assert result.returncode == 2
    assert said in complaint(result)
    assert not list(bench.folder.iterdir())


def test_a_gate_in_ci_is_red_where_it_got_worse_and_only_there(bench):
    base = write(bench.folder / "base", {"local": LOCAL, "sync": SYNC})
    same = write(bench.folder / "same", {"local": LOCAL[::-1], "sync": SYNC})
    worse = write(bench.folder / "worse", {"local": LOCAL, "sync": [e + 0.05 for e in SYNC]})
    assert bench.call("compare-to", base, same).returncode == 0
    result = bench.call("compare-to", base, worse, "--margin", "0.01")
    assert result.returncode == 9
    assert "test_error of arm 'sync'" in complaint(result)
    assert "+5.0 points" in result.stdout
    assert bench.call("compare-to", base, worse, "--margin", "0.06").returncode == 0
