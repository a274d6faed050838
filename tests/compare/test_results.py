"""From trial folders to the files of a study: what is written, what is refused, what is left alone."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from trial_files import (
    DEMO_CLAIMS,
    demo_error,
    make_study,
    study_config,
    trial_config,
    without_figures,
    write_trial,
)

from syncbn.checks import check
from syncbn.compare.results import write_results
from syncbn.compare.study.preflight import claimable_metrics
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError

numbers_alone = pytest.fixture(without_figures)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished demo study and its summary."""
    cfg = study_config(tmp_path_factory.mktemp("runs"), claims=DEMO_CLAIMS)
    make_study(cfg, demo_error)
    return cfg, write_results(cfg)


def small(tmp_path: Path, **settings):
    """Two arms, three seeds, two hundred steps: a study for tests that damage it."""
    settings = {"arms": ("local", "sync"), "seeds": (0, 1, 2), "steps": 200} | settings
    cfg = study_config(tmp_path, **settings)
    make_study(cfg, demo_error)
    return cfg


def files_of(cfg) -> set[str]:
    return {p.relative_to(cfg.folder).as_posix() for p in cfg.folder.rglob("*") if p.is_file()}


def test_a_study_leaves_summary_report_table_and_figures(study):
    cfg, _ = study
    written = {name for name in files_of(cfg) if not name.startswith("trials/")}
    figures = ("error_by_arm", "paired_differences", "convergence", "training_loss", "seconds")
    assert written == {
        "summary.json",
        "report.md",
        "report.html",
        "metrics.parquet",
        *(f"figures/{name}.png" for name in figures),
    }


def test_summary_has_the_agreed_keys(study):
    cfg, summary = study
    assert summary == json.loads((cfg.folder / "summary.json").read_text())
    assert set(summary) == {"study", "versions", "git", "design", "arms", "claims"}
    design = {"data": "digits", "model": "mlp", "world_size": 2, "per_rank_batch": 2, "steps": 600}
    assert summary["design"].items() >= {**design, "seeds": [0, 1, 2, 3, 4, 5]}.items()
    assert (summary["study"], summary["git"]) == ("demo", "0123abc")
    claim_keys = {"name", "metric", "effect", "ci", "threshold", "verdict", "statement", "kind"}
    assert claim_keys | {"n", "p"} <= set(summary["claims"][0])


@pytest.mark.usefixtures("numbers_alone")
def test_a_summarys_values_are_in_the_order_of_the_seeds(tmp_path):
    cfg = small(tmp_path, seeds=(7, 3, 5))
    summary = write_results(cfg)
    assert summary["design"]["seeds"] == [7, 3, 5]
    expected = [demo_error("sync", seed, 200) for seed in (7, 3, 5)]
    assert summary["arms"]["sync"]["test_error"] == pytest.approx(expected)
    assert summary["arms"]["local"]["seconds"] == pytest.approx([1.05, 1.0, 1.1])


def test_a_summary_has_the_verdicts_on_its_claims(study):
    _, summary = study
    beats, equals = summary["claims"]
    assert (beats["verdict"], equals["verdict"]) == ("REPRODUCED", "REPRODUCED")
    assert beats["ci"][0] <= beats["effect"] <= beats["ci"][1] < beats["threshold"] == -0.20
    assert beats["n"] == 6


def test_parquet_holds_every_point_as_a_tidy_row(study):
    cfg, _ = study
    table = pq.read_table(cfg.folder / "metrics.parquet")
    assert table.column_names == ["arm", "seed", "step", "metric", "value"]
    rows = table.to_pylist()
    errors = [r for r in rows if r["metric"] == "test_error"]
    losses = [r for r in rows if r["metric"] == "train_loss"]
    assert (len(errors), len(losses)) == (4 * 6 * 6, 4 * 6 * 60)
    last = next(r for r in errors if (r["arm"], r["seed"], r["step"]) == ("local", 2, 600))
    assert last["value"] == pytest.approx(demo_error("local", 2, 600))


def test_unfinished_trials_are_named_and_nothing_is_written(tmp_path):
    cfg = small(tmp_path)
    (cfg.folder / "trials" / "sync-1" / "summary.json").unlink()
    before = files_of(cfg)
    with pytest.raises(UsageError, match=r"1 of 6 trials .* unfinished: sync-1;"):
        write_results(cfg)
    assert files_of(cfg) == before


@pytest.mark.parametrize("content", ["", "[]", '{"final": {"test_error": 0.1}}', "{"])
def test_a_summary_that_is_no_trial_is_refused(tmp_path, content):
    cfg = small(tmp_path)
    (cfg.folder / "trials" / "sync-1" / "summary.json").write_text(content)
    with pytest.raises(UsageError, match=r"sync-1 is no finished trial"):
        write_results(cfg)


def rewrite(cfg, arm: str, seed: int, change) -> None:
    """Run the trial again under a config that `change` altered."""
    trial = trial_config(cfg, arm, seed)
    change(trial)
    (trial.folder / "journal.jsonl").unlink()
    write_trial(trial, {100: 0.5, 200: 0.4})


def test_arms_that_differ_in_more_than_the_factor_are_refused(tmp_path):
    cfg = small(tmp_path)
    for seed in cfg.study.seeds:
        rewrite(cfg, "sync", seed, lambda trial: setattr(trial.model, "activation", "tanh"))
    with pytest.raises(UsageError, match=r"local-0 and sync-0 differ in model.activation \('relu'"):
        write_results(cfg)


@pytest.mark.usefixtures("numbers_alone")
def test_a_declared_factor_may_differ_by_group_or_by_key(tmp_path):
    cfg = small(tmp_path)
    shared = cfg.optim
    for seed in cfg.study.seeds:
        cfg.optim = type(shared)(lr=0.7)
        rewrite(cfg, "sync", seed, lambda trial: None)
    cfg.optim = shared
    cfg.study.arms["sync"] += ["optim.lr=0.7"]
    for factor in ("optim", "optim.lr"):
        cfg.study.factor = ["norm", factor]
        assert write_results(cfg)["study"] == "demo"
    cfg.study.factor = ["norm", "optim.momentum"]
    with pytest.raises(UsageError, match=r"optim.lr \(0.05 against 0.7\)"):
        write_results(cfg)


def test_seeds_of_one_arm_may_differ_in_the_seed_alone_even_where_the_factor_is_free(tmp_path):
    cfg = small(tmp_path)
    rewrite(cfg, "sync", 2, lambda trial: setattr(trial.norm, "momentum", 0.5))
    with pytest.raises(UsageError, match=r"sync-0 and sync-2 differ in norm.momentum"):
        write_results(cfg)


def test_a_trial_that_took_fewer_steps_than_its_config_is_refused(tmp_path):
    cfg = small(tmp_path)
    shorten(cfg.folder / "trials" / "sync-1", 150)
    with pytest.raises(UsageError, match=r"sync-1 has 150 steps of train.steps=200"):
        write_results(cfg)


@pytest.mark.usefixtures("numbers_alone")
def test_a_trial_that_reached_its_target_may_have_taken_fewer_steps(tmp_path):
    cfg = small(tmp_path, target_error=0.1)
    shorten(cfg.folder / "trials" / "sync-1", 150)
    assert write_results(cfg)["arms"]["sync"]["steps"] == [200, 150, 200]


def shorten(folder: Path, steps: int) -> None:
    """Let the trial in `folder` have ended after `steps`."""
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": steps}))


def test_a_time_limit_is_refused_in_a_study(tmp_path):
    with pytest.raises(UsageError, match=r"train.time_limit_s=9 is not allowed in a study"):
        check(study_config(tmp_path, time_limit_s=9.0))


@pytest.mark.usefixtures("numbers_alone")
def test_trials_may_differ_in_timeouts_and_tracking(tmp_path):
    cfg = small(tmp_path)
    rewrite(cfg, "sync", 2, lambda trial: setattr(trial.launcher, "timeout_s", 7.0))
    rewrite(cfg, "sync", 1, lambda trial: setattr(trial.tracking, "name", "journal"))
    assert write_results(cfg)["study"] == "demo"


def test_a_claim_on_what_was_not_measured_is_refused_before_anything_is_written(tmp_path):
    claim = ClaimConfig(name="c", arm="sync", against="local", metric="top5")
    cfg = small(tmp_path, claims=(claim,))
    before = files_of(cfg)
    with pytest.raises(UsageError, match="arm 'sync' has no 'top5'; measured: train_loss"):
        write_results(cfg)
    assert files_of(cfg) == before


@pytest.mark.usefixtures("numbers_alone")
@pytest.mark.parametrize("train", [{}, {"target_error": 0.01}], ids=["plain", "with a target"])
def test_a_claim_may_speak_of_what_the_summary_has_and_of_nothing_else(tmp_path, train):
    cfg = study_config(tmp_path, ("local", "sync"), (0, 1), steps=100, **train)
    make_study(cfg, demo_error)
    for trial in (cfg.folder / "trials").iterdir():
        add_final(trial, "test_loss", 0.5)
    for arm in write_results(cfg)["arms"].values():
        assert set(arm) == set(claimable_metrics(cfg))


def add_final(folder: Path, metric: str, value: float) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["final"][metric] = value
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.usefixtures("numbers_alone")
def test_steps_to_a_target_are_taken_from_the_curve_and_censored_at_the_budget(tmp_path):
    cfg = study_config(tmp_path, ("local", "sync"), (0, 1), steps=300, target_error=0.1)
    make_study(cfg, lambda arm, seed, step: 0.4 if arm == "local" else 0.3 - 0.001 * step)
    arms = write_results(cfg)["arms"]
    assert arms["sync"]["steps_to_target"] == [200, 200]
    assert arms["local"]["steps_to_target"] == [None, None]


def test_a_loss_that_is_no_number_reaches_summary_figures_and_parquet(tmp_path):
    cfg = small(tmp_path)
    broken = cfg.folder / "trials" / "local-0"
    text = (broken / "summary.json").read_text()
    final = json.loads(text)["final"]
    (broken / "summary.json").write_text(text.replace(repr(final["train_loss"]), '"nan"'))
    with (broken / "journal.jsonl").open("a") as journal:
        journal.write('{"step": 200, "metrics": {"train_loss": "nan"}, "time": 0}\n')
    assert write_results(cfg)["arms"]["local"]["train_loss"][0] is None
    rows = pq.read_table(cfg.folder / "metrics.parquet").to_pylist()
    values = [r["value"] for r in rows if (r["arm"], r["seed"], r["step"]) == ("local", 0, 200)]
    assert any(math.isnan(value) for value in values)


def test_writing_results_again_gives_the_same_bytes_and_no_other_files(study):
    cfg, _ = study
    names = ("summary.json", "report.md", "report.html", "metrics.parquet")
    before, files = [(cfg.folder / name).read_bytes() for name in names], files_of(cfg)
    write_results(cfg)
    assert [(cfg.folder / name).read_bytes() for name in names] == before
    assert files_of(cfg) == files


def test_a_config_without_a_study_is_refused(tmp_path):
    cfg = study_config(tmp_path)
    cfg.study = None
    with pytest.raises(UsageError, match="study is not set"):
        write_results(cfg)


def test_fabricated_studies_pass_the_checks_of_real_ones(tmp_path):
    check(study_config(tmp_path, claims=DEMO_CLAIMS))


@pytest.mark.usefixtures("numbers_alone")
def test_a_diverged_trial_counts_with_an_error_of_one_and_without_a_time(tmp_path):
    error = ClaimConfig(name="error", arm="sync", against="local", threshold=-0.2)
    loss = ClaimConfig(name="loss", arm="sync", against="local", metric="train_loss")
    cfg = small(tmp_path, claims=(error, loss))
    for seed in cfg.study.seeds:
        diverge(cfg.folder / "trials" / f"local-{seed}")
    summary = write_results(cfg)
    local = summary["arms"]["local"]
    assert (local["test_error"], local["diverged"]) == ([1.0] * 3, [1.0] * 3)
    assert (local["seconds"], local["train_loss"]) == ([None] * 3, [None] * 3)
    assert [c["verdict"] for c in summary["claims"]] == ["REPRODUCED", "INCONCLUSIVE"]
    assert "(3 diverged)" in (cfg.folder / "report.md").read_text()


def test_a_study_whose_every_trial_diverged_at_once_still_has_a_report(tmp_path):
    cfg = small(tmp_path, seeds=(0, 1), claims=DEMO_CLAIMS[:1])
    for trial in (cfg.folder / "trials").iterdir():
        diverge(trial, at_step=1)
    summary = write_results(cfg)
    assert summary["claims"][0]["verdict"] == "NOT REPRODUCED"
    assert pq.read_table(cfg.folder / "metrics.parquet").num_rows == 0


def diverge(folder: Path, at_step: int = 50) -> None:
    """Leave what a trial leaves whose loss stopped being finite at `at_step`."""
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    early = [line for line in lines if json.loads(line).get("step", 0) < at_step]
    (folder / "journal.jsonl").write_text("".join(early))
    summary = json.loads((folder / "summary.json").read_text())
    final = {"test_error": 1.0, "diverged": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary | {"final": final, "seconds": 0.0}))
