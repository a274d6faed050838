"""Studies, advice and regressions of tasks that decide by something else than the share of wrong samples."""

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from syncbn.compare.advice import SYNCHRONISE, advice
from syncbn.compare.measure import Measure, deciding, measure, of_task, shown
from syncbn.compare.regression import compare, default_metric
from syncbn.compare.report.words.advice import text
from syncbn.compare.report.words.claims import finding, verdict_sentence
from syncbn.compare.report.words.numbers import labelled, value_words
from syncbn.compare.results import write_results
from syncbn.compare.study import measurements
from syncbn.compare.study.design import study_of, trials
from syncbn.compare.study.preflight import claimable_metrics, refuse_unfit
from syncbn.compare.study.queue import run_trials
from syncbn.compare.study.records import TrialRecord
from syncbn.compare.study.rehearsal import refuse_ungiven
from syncbn.compare.study.tuning import Choice, _best
from syncbn.compose import compose
from syncbn.config import RunConfig, StudyConfig, TargetConfig, TaskConfig
from syncbn.errors import UsageError
from syncbn.runtime.base import Solo
from syncbn.study_checks import complaints
from syncbn.tracking.describe import headline

IOU = Measure("test iou", name="test_iou", lower_is_better=False)
MINE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

import syncbn.extend as extend
from syncbn.config import TaskConfig


@extend.model("small")
def small(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))
    return nn.Sequential(*layers)


@extend.data("fish")
def fish(root, split: str, *, classes: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(len(split))
    inputs = torch.randn(64, 1, 4, 4, generator=generator)
    means = inputs.mean((1, 2, 3))
    return TensorDataset(inputs, (means > 0).long() if classes else 250 + 100 * means)


@extend.task("overlap")
class Overlap(extend.Task):
    decides, lower_is_better = "iou", False

    def loss(self, output, target):
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def measures(self, output, target):
        right = (output.argmax(1) == target).double().sum()
        return {"loss": self.loss(output.double(), target), "iou": right, "hits": right}


@extend.task("graded")
class Graded(extend.Classification):
    def __init__(self) -> None:
        super().__init__(cfg=TaskConfig())
"""
COMMON = [
    "study=advise", "extensions=[mine]", "model=small", "data=fish", "optim.lr=0.0005",
    "train.steps=6", "train.eval_every=3", "train.log_every=3", "launcher.num_workers=2",
    "tracking=journal", "study.seeds=[0,1]",
]  # fmt: skip
OVERLAP = ["task=overlap", "data.options.classes=true"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registrations: None) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def claims(*given: str) -> str:
    return f"study.claims=[{','.join(given)}]"


def ran(*overrides: str) -> dict:
    """The summary of a study whose trials ran in this process."""
    cfg = compose([*COMMON, *overrides])
    refuse_unfit(cfg, cfg.study)
    run_trials(trials(cfg), cfg, Solo(torch.device("cpu")))
    return write_results(cfg)


def curve(values: dict[int, float], name: str = "test_iou", **final: float) -> TrialRecord:
    end = {name: values[max(values)]} if values else {}
    points = {name: values} if values else {}
    return TrialRecord("a", 0, {}, {}, "", end | final, 30, 1.0, 1, "samples", points)


def test_a_classification_decides_by_a_share_and_a_regression_by_its_targets_unit():
    assert deciding(TaskConfig()) == measure("test_error")
    error = deciding(TaskConfig(name="regression"))
    assert (error.name, error.is_share, error.lower_is_better) == ("test_error", False, True)
    assert value_words(error, 37.25) == "37.2"
    assert labelled(error) == "Test mean absolute error (units of the targets)"
    assert value_words(measure("test_error"), 0.0593) == "5.9 %"


def test_names_around_a_measure_are_shown_as_it_is():
    task = TaskConfig(name="regression")
    assert of_task(task, "best_error").words == "best test mean absolute error"
    assert of_task(task, "test_error@20").words == "test mean absolute error at step 20"
    assert not of_task(task, "test_r2").lower_is_better
    for name in ("seconds", "saturation", "exchange_share"):
        assert of_task(task, name) == measure(name)


def test_more_is_better_turns_best_target_and_cells_round():
    seen = curve({10: 0.5, 20: 0.8, 30: 0.7})
    assert measurements.best(seen, IOU) == 0.8
    assert measurements.best_name(IOU) == "best_iou"
    assert measurements.steps_to_target(seen, 0.6, 0.05, IOU) == 20
    assert measurements.steps_to_target(seen, 0.8, 0.05, IOU) == math.inf  # 0.7 comes after it
    held = measurements.targets_of(
        TargetConfig(arm="base", tolerance=0.05), {"base": [seen]}, 1, IOU
    )
    assert held == [pytest.approx(0.75)]
    assert [bool(IOU.better(value, 0.75)) for value in (0.7, 0.75, math.nan, IOU.worst)] == [
        False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("decides", [IOU, deciding(TaskConfig(name="regression"))])
def test_a_diverged_trial_has_no_number_and_never_the_best_one(decides):
    gone = curve({}, diverged=1.0)
    table = measurements.measurements_of([gone], [decides.name], decides)
    assert not math.isfinite(table[decides.name][0])
    assert table[measurements.best_name(decides)] == [decides.worst]
    assert measurements.steps_to_target(gone, 0.5, 0.0, decides) == math.inf


def test_a_search_takes_the_best_mean_and_nothing_that_diverged():
    assert _best({0.1: [0.5, 0.6], 0.2: [0.9, 0.8]}, IOU).value == 0.2
    assert _best({0.1: [0.5, 0.6], 0.2: [0.9, IOU.worst]}, IOU).value == 0.1
    assert _best({0.1: [0.5], 0.2: [0.9]}, measure("test_error")) == Choice(
        0.1, {0.1: [0.5], 0.2: [0.9]}
    )


def test_a_target_of_a_regression_may_be_any_number():
    study = StudyConfig(arms={"a": []}, target=TargetConfig(error=37.5))
    assert list(complaints(study, classifies=False)) == []
    assert "a fraction from 0 to 1" in next(complaints(study))


def test_a_study_of_a_regression_speaks_in_the_targets_unit(project):
    summary = ran(
        "task=regression",
        claims(
            "{name:beats,arm:sync,against:local,threshold:-5}",
            "{name:r2,arm:sync,against:local,metric:test_r2,kind:greater}",
        ),
    )
    report = (project / "runs/advise/report.md").read_text()
    assert summary["design"]["primary_metric"] == "test_error"
    assert "median test mean absolute error" in report
    assert "%" not in report.partition("## Repeat it")[0].replace("95 % interval", "")
    assert "points" not in report.partition("## Repeat it")[0]
    claim = summary["claims"][0]
    assert "Test mean absolute error, sync" in verdict_sentence(claim)
    assert "Claimed was below \N{MINUS SIGN}5.00" in verdict_sentence(claim)
    assert (project / "runs/advise/figures/error_by_arm.png").is_file()
    assert set(headline(summary)) >= {"test_error/local", "test_error/sync"}


def test_a_study_of_a_task_without_an_error_is_about_what_it_decides_by(project):
    summary = ran(*OVERLAP, claims("{name:beats,arm:sync,against:local,kind:greater}"))
    claim = summary["claims"][0]
    assert claim["metric"] == summary["design"]["primary_metric"] == "test_iou"
    assert "test_error" not in summary["arms"]["sync"]
    assert finding(claim | {"effect": 0.25}, {}).startswith(
        "Test iou with synchronised batch norm is 0.250 higher than"
    )
    assert (project / "runs/advise/figures/iou_by_arm.png").is_file()
    assert json.loads((project / "runs/advise/summary.json").read_text()) == summary
    assert not default_metric(summary).lower_is_better
    assert compare(summary, summary).changes[0].measure.name == "test_iou"


def test_a_trial_that_diverges_is_counted_and_gives_no_verdict(project):
    summary = ran(
        "task=regression", "optim.lr=1e30", "study.arms.local=['norm=none']",
        claims("{name:beats,arm:sync,against:local,threshold:-5}"),
    )  # fmt: skip
    assert summary["arms"]["local"]["test_error"] == [None, None]
    assert summary["claims"][0]["verdict"] == "INCONCLUSIVE"
    assert "(2 diverged)" in (project / "runs/advise/report.md").read_text()


def test_a_claim_on_what_a_task_does_not_give_is_refused_before_trials(project):
    cfg = compose([*COMMON, "task=regression", claims("{name:c,arm:sync,metric:test_iou}")])
    with pytest.raises(UsageError, match=r"'test_iou' is not measured: one of .*test_r2"):
        refuse_unfit(cfg, cfg.study)


@pytest.mark.parametrize("metric", ["test_hits", "test_hist", "iou"])
def test_the_measures_of_an_extension_are_found_before_trials(project, metric):
    cfg = compose([*COMMON, *OVERLAP, claims(f"{{name:c,arm:sync,metric:{metric}}}")])
    known = nullcontext() if metric == "test_hits" else pytest.raises(UsageError, match="test_iou")
    with known:
        refuse_before_trials(cfg)


def refuse_before_trials(cfg) -> None:
    refuse_unfit(cfg, cfg.study)
    refuse_ungiven(cfg)


def test_a_classification_of_ones_own_still_speaks_in_percent(project):
    cfg = compose([*COMMON, "task=graded", "data.options.classes=true"])
    assert deciding(cfg.task) == measure("test_error")
    assert study_of(cfg).primary_metric == "test_error"
    assert set(claimable_metrics(cfg)) >= {"test_error", "best_error"}


def of_design(decides: Measure, **arms: float) -> dict:
    wobble = [1.0, -2, 3, -1, 0, 2, -3, 1]
    design = {
        "data": "fish", "model": "small", "world_size": 8, "per_rank_batch": 2, "steps": 600,
        "seeds": list(range(8)), "virtual": True, "split": "test", "decides": decides.name,
        "measures": {decides.name: vars(decides)},
    }  # fmt: skip
    values = {
        arm: {decides.name: [value * (1 + w / 1000) for w in wobble[i:] + wobble[:i]]}
        for i, (arm, value) in enumerate(arms.items())
    }
    return {"study": "advise", "design": design, "arms": values, "claims": []}


def test_advice_takes_the_largest_where_more_is_better():
    summary = of_design(IOU, local=0.42, group_4=0.64, sync=0.65)
    found = advice(summary)
    assert (found.verdict, found.group.arm) == (SYNCHRONISE, "sync")
    assert found.gain.median == pytest.approx(0.23, abs=0.01)
    assert found.margin == found.point == pytest.approx(0.0065, rel=0.01)
    assert "test iou 0.420 local, 0.650 over all 8 ranks (16 samples): 0.230 more" in text(
        found, summary
    )


def test_advice_for_a_regression_has_a_margin_in_its_unit():
    error = deciding(TaskConfig(name="regression"))
    summary = of_design(error, local=64.0, sync=22.0)
    assert advice(summary).margin == pytest.approx(0.64, rel=0.01)
    assert advice(summary, margin=50.0).verdict != SYNCHRONISE
    assert "test mean absolute error 64.0 local, 22.0" in text(advice(summary), summary)
    assert shown(summary, "test_error@5").words == "test mean absolute error at step 5"


def test_a_run_of_no_classification_that_diverged_ends_without_an_error():
    from syncbn.compare.study.queue import _diverged

    assert _diverged(RunConfig(), 3, 1).final["test_error"] == 1.0
    plain = RunConfig(task=TaskConfig(name="regression"))
    assert set(_diverged(plain, 3, 1).final) == {"train_loss", "diverged"}
