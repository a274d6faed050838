"""From the trials of a study to its summary: what was compared, what each arm measured, the verdict on each claim.

It is a pure function of configs and records; `results` writes what it returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from syncbn.compare.measure import as_design, deciding, measure, of_task
from syncbn.compare.statistics import claims
from syncbn.compare.statistics.claims import Curve, Verdict
from syncbn.compare.study import measurements
from syncbn.compare.study.design import about_the_task, arm_configs, arms_of
from syncbn.compare.study.records import TrialRecord
from syncbn.compare.study.summary import base_of, finite
from syncbn.compare.study.tuning import Choice, tuned_values
from syncbn.config import Config, StudyConfig, TaskConfig


def summarise(
    cfg: Config,
    study: StudyConfig,
    trials: Sequence[TrialRecord],
    choices: Mapping[str, Choice] | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`; a number that JSON has none for is None.

    Raises:
        UsageError: a claim's metric is missing in some trial.
    """
    study, decides = about_the_task(study, cfg), deciding(cfg.task)
    arms = measurements.by_arm(trials)
    target = measurements.target_of(cfg)
    targets = measurements.targets_of(target, arms, len(study.seeds), decides)
    tuned = tuned_values(choices or {}) or {}
    table = measurements.measure(study, arms, target, tuned, decides)
    if study.grid and targets:
        table |= measurements.families(arms_of(study), table, targets[0], decides)
    curves = {arm: _curves(own, study) for arm, own in arms.items()}
    verdicts = claims.judge(study.judged, table, study.seeds, curves)
    summary = {
        "study": cfg.name,
        "versions": shared_versions([trial.versions for trial in trials]),
        "git": ", ".join(sorted({trial.git for trial in trials})),
        "design": _design(cfg, study, targets, choices or {})
        | as_design(cfg.task, _bases(table, study)),
        "arms": table,
        "claims": [_claim_entry(verdict, cfg.task) for verdict in verdicts],
    }
    return finite(summary)


def _curves(trials: Sequence[TrialRecord], study: StudyConfig) -> dict[str, list[Curve]]:
    """The curves that claims on shares speak of."""
    metrics = {claim.metric for claim in study.judged if claim.scale == "share"}
    return {metric: [trial.points.get(metric, {}) for trial in trials] for metric in metrics}


def _design(
    cfg: Config,
    study: StudyConfig,
    targets: Sequence[float] | None,
    choices: Mapping[str, Choice],
) -> dict[str, Any]:
    """What was compared on what."""
    runs = arm_configs(cfg, tuned_values(choices))
    return {
        "data": cfg.data.name,
        "model": cfg.model.arch or cfg.model.name,
        "world_size": cfg.launcher.num_workers,
        "per_rank_batch": cfg.train.per_rank_batch,
        "steps": cfg.train.steps,
        "seeds": list(study.seeds),
        "split": "validation" if cfg.data.validation else "test",
        "virtual": cfg.train.virtual,
        "normalisation_batch": {
            a: measurements.normalisation_batch(run) for a, run in runs.items()
        },
        "tuned": {arm: _tuned(study, choice) for arm, choice in choices.items()},
        "target": measurements.middle(targets),
        "grid": study.grid,
        "families": {arm.name: arm.family for arm in arms_of(study)} if study.grid else {},
        "tier": study.tier if study.tiers else None,
        "primary_metric": study.primary_metric,
        "statement": study.statement,
        "later": study.later,
        "published": [asdict(table) for table in study.published],
    }


def _tuned(study: StudyConfig, choice: Choice) -> dict[str, Any]:
    """What the search chose for an arm, and the mean validation error of each value that it tried."""
    assert study.tune is not None
    errors = {f"{value:g}": sum(found) / len(found) for value, found in choice.errors.items()}
    return {study.tune.key: choice.value, "errors": errors, "at_an_end": choice.at_an_end}


def _claim_entry(verdict: Verdict, task: TaskConfig) -> dict[str, Any]:
    """A verdict as `summary.json` holds it; with its measure, where that is not as its name says."""
    bounds90, shown = verdict.interval90, of_task(task, verdict.claim.metric)
    return {
        **asdict(verdict.claim),
        "effect": verdict.effect,
        "ci": [verdict.interval.low, verdict.interval.high],
        "ci90": None if bounds90 is None else [bounds90.low, bounds90.high],
        "verdict": verdict.verdict,
        "n": verdict.n,
        "p": verdict.p,
        "p_holm": verdict.p_holm,
        "pairs": verdict.pairs,
        "note": verdict.note,
        **({} if shown == measure(verdict.claim.metric) else {"measure": asdict(shown)}),
    }


def _bases(table: Mapping[str, measurements.Table], study: StudyConfig) -> dict[str, None]:
    """All metrics of `table`, and what the study is about, each once, without layer and step."""
    measured = [*(metric for own in table.values() for metric in own), study.primary_metric]
    return dict.fromkeys(base_of(metric) for metric in measured)


def shared_versions(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """One version a package; all that were used where trials ran under several."""
    packages = dict.fromkeys(package for each in versions for package in each)
    return {
        package: ", ".join(sorted({each[package] for each in versions if package in each}))
        for package in packages
    }
