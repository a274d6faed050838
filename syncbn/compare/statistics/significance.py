"""Hypothesis tests over the seeds of a study: t, equivalence, trend and sign tests, and Holm's correction.

Every function takes one value a seed, in the order of the seeds. What cannot be tested has a p value of 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from syncbn.compare.statistics.effects import Floats, Interval, standard_error, t_interval


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests: the larger p value, and the 90 % interval they amount to."""

    p: float
    interval: Interval


def p_below(sample: Floats, bound: float) -> float:
    """One-sided t test: p value of "the mean is at or above `bound`".

    One value tests nothing, nor do values that are not finite: p is 1.
    """
    if len(sample) < 2 or not np.isfinite(sample).all():
        return 1.0
    distance, error = float(np.mean(sample)) - bound, standard_error(sample)
    if error == 0:
        return 0.0 if distance < 0 else 1.0
    return float(stats.t.cdf(distance / error, len(sample) - 1))


def tost(sample: Floats, margin: float) -> Equivalence:
    """Two one-sided t tests that the mean lies within +-`margin` (Schuirmann 1987).

    Both reject at 5 % exactly where the 90 % t interval lies inside the margin.
    """
    p = max(p_below(sample, margin), p_below(-sample, margin))
    return Equivalence(p, t_interval(sample, 0.90))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for being several, in the order given (Holm 1979).

    Compare each with the level itself.
    """
    order = np.argsort(p_values, kind="stable")
    weights = np.arange(len(p_values), 0, -1)
    stepped = np.maximum.accumulate(weights * np.asarray(p_values, dtype=np.float64)[order])
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def kendall(values: Floats) -> float:
    """Kendall's tau-b of `values` against their order: 1 always rising, -1 always falling; 0 where all are equal."""
    if not np.isfinite(values).all():
        return math.nan
    found = stats.kendalltau(np.arange(len(values)), values)
    tau = float(found.statistic)  # pyright: ignore[reportAttributeAccessIssue]
    return 0.0 if math.isnan(tau) else tau


def p_trend(rows: Floats) -> float:
    """P value of Page's test that the columns of `rows`, (seeds, arms), rise from left to right (Page 1963).

    Exact where it can be; rows that are not finite test nothing: p is 1.
    """
    if rows.shape[0] < 2 or rows.shape[1] < 3 or not np.isfinite(rows).all():
        return 1.0
    return float(stats.page_trend_test(rows).pvalue)


def p_sign(successes: int, total: int) -> float:
    """One-sided sign test: chance of so many successes or more among `total` fair coins."""
    return float(stats.binom.sf(successes - 1, total, 0.5)) if total else 1.0
