"""The points that trials recorded during training, as arrays over seeds, layers and steps.

Seeds are combined only at steps that all of them have, so that a median is over the same seeds along a whole curve.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.records import TrialRecord
from syncbn.compare.study.summary import Summary

Trials = Sequence[TrialRecord]


def by_arm(summary: Summary, trials: Trials, prefix: str) -> dict[str, list[TrialRecord]]:
    """The trials of each arm that has points of `prefix` or `prefix/<layer>`, in the order of the arms."""
    table = {arm: [t for t in trials if t.arm == arm] for arm in summary["arms"]}
    return {arm: own for arm, own in table.items() if own and all(has(t, prefix) for t in own)}


def has(trial: TrialRecord, prefix: str) -> bool:
    """Whether `trial` recorded `prefix` or `prefix/<layer>`."""
    return any(metric == prefix or metric.startswith(f"{prefix}/") for metric in trial.points)


def shared_points(trials: Trials, metric: str) -> tuple[Floats, Floats]:
    """Steps (n,) that all `trials` have, and `metric` there, (trials, n); what is not finite is NaN.

    A trial that stopped early cuts the others too: a median over the seeds that were left would
    change its meaning on the way.
    """
    points = [trial.points.get(metric, {}) for trial in trials]
    shared = sorted(set.intersection(*(set(each) for each in points)))
    values = np.array([[each[step] for step in shared] for each in points], dtype=float)
    return np.array(shared, dtype=float), np.where(np.isfinite(values), values, np.nan)


def layers_of(trials: Trials, prefix: str) -> list[int]:
    """The layers that any of `trials` has points for, in order."""
    names = (metric.rpartition("/") for trial in trials for metric in trial.points)
    return sorted({int(layer) for base, _, layer in names if base == prefix and layer.isdigit()})


def layered(trials: Trials, prefix: str) -> tuple[list[int], Floats, Floats]:
    """Layers, the steps that all have, and `prefix/<layer>` there: (trials, layers, steps)."""
    layers = layers_of(trials, prefix)
    found = [shared_points(trials, f"{prefix}/{layer}") for layer in layers]
    steps = sorted(set.intersection(*(set(each.tolist()) for each, _ in found)))
    values = [own[:, np.isin(each, steps)] for each, own in found]
    return layers, np.array(steps), np.stack(values, axis=1)


def smooth(values: Floats, window: int) -> Floats:
    """Mean over `window` neighbours along the last axis, over fewer at the ends.

    No values at all, as of an arm that diverged at once, stay none.
    """
    if values.shape[-1] == 0:
        return values
    ones = np.ones(window)
    count = np.convolve(np.ones(values.shape[-1]), ones, "same")
    return np.array([np.convolve(row, ones, "same") / count for row in values])


def setting_of(trial: TrialRecord, key: str) -> Any:
    """The value of a dotted key in the config that `trial` recorded."""
    node: Any = trial.config
    for part in key.split("."):
        node = node[part]
    return node


def budget_of(trials: Trials) -> int:
    """Steps that `trials` were to take."""
    return max(int(setting_of(trial, "train.steps")) for trial in trials)


def geometric_mean(values: Floats, axis: int = -1) -> Floats:
    """Geometric mean of what is positive; NaN of nothing."""
    logs = np.log(np.where(values > 0, values, np.nan))
    count = np.isfinite(logs).sum(axis=axis)
    sums = np.nansum(logs, axis=axis)
    return np.exp(np.where(count > 0, sums / np.maximum(count, 1), np.nan))
