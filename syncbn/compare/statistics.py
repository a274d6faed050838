"""Statistics over the seeds of a study: effects, intervals, equivalence, correction, censoring.

Every function is pure and takes one value a seed, in the order of the seeds. The decision that
shaped the file: with 6 to 10 seeds no single interval is to be trusted (the bootstrap covers too
little, the t interval assumes a normal distribution), so both are computed and the one reported is
the smallest that holds both.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
"""The same numbers give the same interval, whenever and wherever a report is made again."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; infinite ends where too few values bound it."""

    low: float
    high: float

    def hull(self, other: "Interval") -> "Interval":
        """The smallest interval that holds both."""
        return Interval(min(self.low, other.low), max(self.high, other.high))


NO_BOUNDS = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class Effect:
    """The median of `n` values (one a seed) with its two 95 % intervals."""

    median: float
    bca: Interval
    t: Interval
    n: int

    @property
    def interval(self) -> Interval:
        """The interval to report and judge by: the hull of the bootstrap's and the t interval."""
        return self.bca.hull(self.t)


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests: the larger p value, and the 90 % interval they amount to."""

    p: float
    interval: Interval


@dataclass(frozen=True)
class StepsToTarget:
    """How many of `total` runs reached the target, and the median step, None where half did not."""

    reached: int
    total: int
    median: float | None


def paired_differences(arm: Sequence[float], against: Sequence[float]) -> Floats:
    """`arm - against`, seed by seed; infinities of equal sign differ by NaN.

    Raises:
        ValueError: the arms hold different numbers of seeds.
    """
    with np.errstate(invalid="ignore"):
        return np.subtract(*_paired(arm, against))


def paired_log_ratios(arm: Sequence[float], against: Sequence[float]) -> Floats:
    """`log(arm / against)`, seed by seed; NaN where a value is not positive or both are infinite.

    Ratios are averaged and bounded on this scale, where twice and half are equally far from 1.

    Raises:
        ValueError: the arms hold different numbers of seeds.
    """
    values, reference = _paired(arm, against)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.log(values) - np.log(reference)
    return np.where((values > 0) & (reference > 0), ratios, np.nan)


def _paired(arm: Sequence[float], against: Sequence[float]) -> tuple[Floats, Floats]:
    if len(arm) != len(against):
        raise ValueError(f"{len(arm)} values against {len(against)}: pairs need one a seed in each")
    return np.asarray(arm, dtype=np.float64), np.asarray(against, dtype=np.float64)


def effect(values: Sequence[float] | Floats) -> Effect:
    """Median of `values`, one a seed, with both its 95 % intervals.

    A value that is not finite leaves nothing to say: the median is NaN, the intervals unbounded.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) == 0 or not np.isfinite(sample).all():
        return Effect(math.nan, NO_BOUNDS, NO_BOUNDS, len(sample))
    t = t_interval(sample)
    return Effect(float(np.median(sample)), bca_interval(sample), t, len(sample))


def bca_interval(sample: Floats) -> Interval:
    """95 % bootstrap interval of the median, bias-corrected and accelerated (Efron 1987).

    Fallbacks, each where the correction is undefined: fewer than three values give the t interval;
    values that are all equal give their one point; a degenerate jackknife (the median does not move
    whichever value is left out) gives the percentile interval of the same resamples.
    """
    if len(sample) < 3:
        return t_interval(sample)
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (sample,),
            np.median,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(BOOTSTRAP_SEED),
        )
    low, high = result.confidence_interval
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = np.quantile(result.bootstrap_distribution, _tails(CONFIDENCE))
    return Interval(float(low), float(high))


def t_interval(sample: Floats, confidence: float = CONFIDENCE) -> Interval:
    """Student's interval of the mean; on paired differences, the paired t interval.

    One value bounds nothing.
    """
    if len(sample) < 2:
        return NO_BOUNDS
    centre = float(np.mean(sample))
    reach = float(stats.t.ppf(_tails(confidence)[1], len(sample) - 1) * _standard_error(sample))
    return Interval(centre - reach, centre + reach)


def p_below(sample: Floats, bound: float) -> float:
    """One-sided t test: p value of "the mean is at or above `bound`".

    One value tests nothing, nor do values that are not finite: p is 1.
    """
    if len(sample) < 2 or not np.isfinite(sample).all():
        return 1.0
    distance, error = float(np.mean(sample)) - bound, _standard_error(sample)
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


def page(rows: Floats) -> float:
    """P value of Page's test that the columns of `rows`, (seeds, arms), rise from left to right (Page 1963).

    Exact where it can be; rows that are not finite test nothing: p is 1.
    """
    if rows.shape[0] < 2 or rows.shape[1] < 3 or not np.isfinite(rows).all():
        return 1.0
    return float(stats.page_trend_test(rows).pvalue)


def p_sign(successes: int, total: int) -> float:
    """One-sided sign test: chance of so many successes or more among `total` fair coins."""
    return float(stats.binom.sf(successes - 1, total, 0.5)) if total else 1.0


def steps_to_target(steps: Sequence[float]) -> StepsToTarget:
    """Summary of steps to a target over seeds, where `inf` stands for a run censored at its budget.

    A mean over censored runs would make slow arms look fast. The median needs no values beyond it,
    so it is defined while more than half of the runs arrive.
    """
    reached = int(np.isfinite(steps).sum())
    median = float(np.median(steps)) if len(steps) else math.inf
    return StepsToTarget(reached, len(steps), median if math.isfinite(median) else None)


def band(curves: Floats) -> tuple[Floats, Floats, Floats]:
    """Lower end, median and upper end of the middle 95 % over seeds; `curves` is (seeds, steps)."""
    low, high = _tails(CONFIDENCE)
    lower, middle, upper = np.quantile(curves, (low, 0.5, high), axis=0)
    return lower, middle, upper


def _standard_error(sample: Floats) -> float:
    """Standard error of the mean; exactly 0 for equal values, which rounding would hide."""
    if np.ptp(sample) == 0:
        return 0.0
    return float(np.std(sample, ddof=1) / math.sqrt(len(sample)))


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
