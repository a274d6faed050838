"""What a summary holds, asked for in the terms of a study: the arms to show, the cells of a grid, medians, the pair.

The decision that shaped the file: whatever a reader meets is read from `summary.json` alone, so that figures, report
and terminal cannot tell three stories. None stands for what JSON has no number for: missing, censored or not finite.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from syncbn.compare.measures import base_of
from syncbn.compare.statistics import Floats

Summary = Mapping[str, Any]
Cell = tuple[float, ...]
"""The values of a grid's keys in one of its cells."""


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
    """The two arms a title speaks of: (against, arm).

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
    """Those of `pair` that stand in `arms`, else the first and the last of `arms`: whom a title can speak of."""
    known = list(dict.fromkeys(arm for arm in pair if arm in arms))
    return known if len(known) == 2 else list(dict.fromkeys((arms[0], arms[-1])))
