"""From trials to one value a seed and metric: what they ended with, and what follows from their curves.

Everything is computed from the journals when the study is compared, so a trial that was interrupted and resumed, or
that ran elsewhere, is measured like any other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from syncbn.compare.measure import Measure
from syncbn.compare.study.design import Arm
from syncbn.compare.study.records import TrialRecord
from syncbn.config import Config, RunConfig, StudyConfig, TargetConfig

Table = dict[str, list[float | None]]
"""Metric -> one value a seed."""

STEPS_TO_TARGET, CELLS_TRAINED = "steps_to_target", "cells_trained"


def by_arm(trials: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """The trials of each arm, in their order."""
    table: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        table.setdefault(trial.arm, []).append(trial)
    return table


def measure(
    study: StudyConfig,
    arms: Mapping[str, Sequence[TrialRecord]],
    target: TargetConfig | None,
    tuned: Mapping[str, float],
    decides: Measure,
) -> dict[str, Table]:
    """Every arm's table, those of grid cells and, with a grid, of the families they make up.

    Args:
        study: what was declared.
        arms: the trials of each arm, one a seed.
        target: what steps are counted to, where there is something.
        tuned: arm to what the search chose for it.
        decides: the measure that the task decides by.
    """
    metrics = dict.fromkeys(metric for own in arms.values() for t in own for metric in t.final)
    if any(t.diverged for own in arms.values() for t in own):  # perhaps all of them did
        metrics |= dict.fromkeys([decides.name, *_judged_at_end(study)])
    table = {arm: measurements_of(own, metrics, decides) for arm, own in arms.items()}
    targets = targets_of(target, arms, len(study.seeds), decides)
    for arm, own in arms.items():
        table[arm] |= {metric: at_step(own, metric) for metric in stepwise(study)}
        if target is not None and targets is not None and not study.grid:
            table[arm][STEPS_TO_TARGET] = [
                steps_to_target(trial, error, target.tolerance, decides)
                for trial, error in zip(own, targets, strict=True)
            ]
    for arm, value in tuned.items():
        assert study.tune is not None
        table[arm][f"tuned_{study.tune.key.rpartition('.')[2]}"] = [value] * len(study.seeds)
    return table


def measurements_of(
    trials: Sequence[TrialRecord], metrics: Iterable[str], decides: Measure
) -> Table:
    """One arm's table: final metrics, and the best of what decides on the way.

    What a diverged trial could not measure is infinite: censored, not missing.
    """
    table: Table = {
        metric: [trial.final.get(metric, math.inf if trial.diverged else None) for trial in trials]
        for metric in metrics
    }
    table["diverged"] = [float(trial.diverged) for trial in trials]
    table["seconds"] = [math.inf if trial.diverged else trial.seconds for trial in trials]
    table["steps"] = [math.inf if trial.diverged else trial.steps for trial in trials]
    table["world_size"] = [trial.world_size for trial in trials]
    table[best_name(decides)] = [best(trial, decides) for trial in trials]
    return table


def best_name(decides: Measure) -> str:
    """What the best of all evaluations is called: `best_error`."""
    return f"best_{decides.name.removeprefix('test_')}"


def best(trial: TrialRecord, decides: Measure) -> float:
    """The smallest test error of all evaluations, the last included; or the best of what else decides.

    Infinite where a diverged trial has none.
    """
    found = [*trial.points.get(decides.name, {}).values()]
    found += [trial.final[decides.name]] if decides.name in trial.final else []
    known = [value for value in found if not math.isnan(value)]
    return min(known, key=lambda value: decides.sign * value, default=decides.worst)


def errors_held(trial: TrialRecord, tolerance: float, decides: Measure) -> list[tuple[int, float]]:
    """Each evaluated step, and the smallest target that counts as reached there; negative where more is better.

    That is the test error, or more where the next evaluation lies further above than `tolerance`: a lucky dip does not
    count. The last evaluation has no next, and counts.
    """
    steps = sorted(trial.points.get(decides.name, {}).items())
    steps = [(step, decides.sign * value) for step, value in steps]
    errors = [error for _, error in steps]
    following = [*errors[1:], -math.inf][: len(errors)]  # nothing follows on nothing
    return [
        (step, max(error, after - tolerance))
        for (step, error), after in zip(steps, following, strict=True)
    ]


def steps_to_target(trial: TrialRecord, error: float, tolerance: float, decides: Measure) -> float:
    """The first evaluated step that held that value; infinity where the budget ended before: censored."""
    held = errors_held(trial, tolerance, decides)
    goal = decides.sign * error
    return next((step for step, smallest in held if smallest <= goal), math.inf)


def target_of(cfg: Config) -> TargetConfig | None:
    """What the study in `cfg` counts steps to: its own target, else the error at which its trials stop."""
    if cfg.study is not None and cfg.study.target is not None:
        return cfg.study.target
    error = cfg.train.target_error
    return None if error is None else TargetConfig(error=error)


def targets_of(
    target: TargetConfig | None,
    arms: Mapping[str, Sequence[TrialRecord]],
    num_seeds: int,
    decides: Measure,
) -> list[float] | None:
    """The target of each seed: a number declared, or the best that an arm holds under the same seed."""
    if target is None:
        return None
    if target.error is not None:
        return [target.error] * num_seeds
    held = (errors_held(trial, target.tolerance, decides) for trial in arms[target.arm or ""])
    least = 0.0 if decides.is_share else -math.inf  # without an evaluation nothing is reached
    return [decides.sign * min((smallest for _, smallest in own), default=least) for own in held]


def _judged_at_end(study: StudyConfig) -> list[str]:
    """The measures at the end of a trial that claims speak of."""
    metrics = [claim.metric for claim in study.judged]
    return [metric for metric in metrics if metric.startswith("test_") and "@" not in metric]


def stepwise(study: StudyConfig) -> list[str]:
    """The metrics of the form `metric@step` that claims speak of."""
    return list(dict.fromkeys(claim.metric for claim in study.judged if "@" in claim.metric))


def at_end(metric: str) -> str:
    """`metric` without its step."""
    return metric.partition("@")[0]


def at_step(trials: Sequence[TrialRecord], metric: str) -> list[float | None]:
    """`metric@step` of each trial; None where its journal has no such point, infinity where it diverged before."""
    name, _, step = metric.partition("@")
    return [
        trial.points.get(name, {}).get(int(step), math.inf if trial.diverged else None)
        for trial in trials
    ]


def families(
    arms: Sequence[Arm], table: Mapping[str, Table], error: float, decides: Measure
) -> dict[str, Table]:
    """For a grid: in how many of its cells each arm of `study.arms` got to `error` or better, a number a seed."""
    counts: dict[str, Table] = {}
    for arm in arms:
        errors = table[arm.name][decides.name]
        reached = [float(e is not None and bool(decides.better(e, error))) for e in errors]
        own = counts.setdefault(arm.family, {CELLS_TRAINED: [0.0] * len(reached), "cells": []})
        own[CELLS_TRAINED] = [
            (a or 0.0) + b for a, b in zip(own[CELLS_TRAINED], reached, strict=True)
        ]
        own["cells"] = [(a or 0.0) + 1 for a in own["cells"] or [0.0] * len(reached)]
    return counts


def normalisation_batch(run: RunConfig) -> int | None:
    """How many samples of a step share their statistics; None where there is no batch norm."""
    each, ranks = run.train.per_rank_batch, run.launcher.num_workers
    together: dict[str, Any] = {
        "local": each,
        "local_avg": each,
        "sync": each * ranks,
        "torch_sync": each * ranks,
        "big_batch": each * ranks,
        "sync_group": each * (run.norm.group_size or 1),
        "ghost": run.norm.ghost_size,
    }
    return together.get(run.norm.name)


def middle(values: Sequence[float] | None) -> float | None:
    """The median; None of nothing."""
    return median(values) if values else None
