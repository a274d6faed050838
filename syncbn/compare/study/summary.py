"""The summary of a finished study: read from `summary.json`, checked, and asked for arms, cells, values and medians.

Figures, report, terminal, advice and regressions read this one file and no trial, so they agree, and work on a summary
kept from a machine that is gone. None stands for what JSON has no number for: missing, censored or not finite.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from syncbn.compare.statistics.effects import Floats
from syncbn.errors import UsageError

Summary = Mapping[str, Any]
Cell = tuple[float, ...]
"""The values of a grid's keys in one of its cells."""

_DUE: dict[str, type] = {"study": str, "design": dict, "arms": dict, "claims": list}


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the study in `folder`.

    Raises:
        UsageError: there is none, it is damaged, or it is of a run rather than a study.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no finished study: {path} is missing")
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    complaint = _complaint(summary)
    if complaint:
        raise UsageError(f"{path} is no study's summary: {complaint}")
    return summary


def _complaint(summary: Any) -> str:
    """What `summary` lacks of a study's, or nothing."""
    if not isinstance(summary, dict):
        return "not a JSON object"
    for key, kind in _DUE.items():
        if not isinstance(summary.get(key), kind):
            return f"{key!r} is missing"
    seeds = summary["design"].get("seeds")
    if not isinstance(seeds, list):
        return "design.seeds is missing"
    for arm, metrics in summary["arms"].items():
        for metric, values in metrics.items():
            if not isinstance(values, list) or len(values) != len(seeds):
                return f"{metric!r} of arm {arm!r} is no list of one value a seed ({len(seeds)})"
    return ""


def finite(tree: Any) -> Any:
    """`tree`, lists and dicts inside it too, with None for each number that JSON has none for."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def is_grid(summary: Summary) -> bool:
    """Whether every arm was run in the cells of a grid."""
    return bool(summary["design"].get("grid"))


def shown_arms(summary: Summary) -> list[str]:
    """The arms that tables and figures have rows for: those of a grid without their cells."""
    if not is_grid(summary):
        return list(summary["arms"])
    return list(dict.fromkeys(summary["design"]["families"].values()))


def cells_of(summary: Summary, family: str) -> dict[Cell, str]:
    """Cells of a grid in order, with the arm that ran there as `family`."""
    found = (arm for arm, of in summary["design"]["families"].items() if of == family)
    return {tuple(map(float, arm[len(family) + 1 :].split("_"))): arm for arm in found}


def values_of(summary: Summary, arm: str, metric: str) -> list[float | None]:
    """An arm's values of a metric, one a seed; none at all where the arm has no such metric."""
    return list(summary["arms"].get(arm, {}).get(metric, []))


def array_of(summary: Summary, arm: str, metric: str) -> Floats:
    """`values_of` for arithmetic, with NaN where there is no number."""
    return np.array(values_of(summary, arm, metric), dtype=float)


def arms_with(summary: Summary, *metrics: str) -> list[str]:
    """The shown arms that have a number for each of `metrics` in some seed."""
    return [
        arm
        for arm in shown_arms(summary)
        if all(any(v is not None for v in values_of(summary, arm, metric)) for metric in metrics)
    ]


def median_of(summary: Summary, arm: str, metric: str) -> float | None:
    """Median over seeds of an arm's metric, None where a seed has no number for it."""
    values = values_of(summary, arm, metric)
    known = [value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) else None


def contrast(summary: Summary, about: str | None = None) -> tuple[str, str]:
    """The two arms that a title contrasts: (against, arm).

    They are those of the first claim that compares two arms, of one on the metric `about` if there is such. Without
    any, they are the first arm and the last, or the arm that the first claim speaks of.
    """
    claims = sorted(summary["claims"], key=lambda claim: base_of(claim["metric"]) != about)
    for claim in claims:
        if claim.get("along"):
            return claim["along"][0], claim["along"][-1]
        if claim["against"]:
            return claim["against"], claim["arm"]
    arms = shown_arms(summary)
    named = [claim["arm"] for claim in claims if claim["arm"] in arms]
    last = named[0] if named and named[0] != arms[0] else arms[-1]
    return arms[0], last


def among(pair: Sequence[str], arms: Sequence[str]) -> list[str]:
    """Those of `pair` that stand in `arms`, else the first and the last of `arms`."""
    known = list(dict.fromkeys(arm for arm in pair if arm in arms))
    return known if len(known) == 2 else list(dict.fromkeys((arms[0], arms[-1])))


def by_seed(summary: Summary, arm: str, metric: str) -> dict[int, float | None]:
    """Seed to value of an arm's metric, None where it was censored or not finite; empty where it was not measured."""
    values = summary["arms"].get(arm, {}).get(metric)
    return {} if values is None else dict(zip(summary["design"]["seeds"], values, strict=True))


def base_of(metric: str) -> str:
    """The metric's name without layer and step."""
    return metric.partition("@")[0].partition("/")[0]
