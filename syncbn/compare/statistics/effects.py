"""Effects over the seeds of a study: paired differences and ratios, medians, intervals, censored counts.

Every function takes one value a seed, in the order of the seeds. With 6 to 10 seeds no single interval can be trusted
(the bootstrap covers too little, the t interval assumes a normal distribution), so both are computed and the smallest
interval that holds both is reported.
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
    reach = float(stats.t.ppf(_tails(confidence)[1], len(sample) - 1) * standard_error(sample))
    return Interval(centre - reach, centre + reach)


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


def standard_error(sample: Floats) -> float:
    """Standard error of the mean; exactly 0 for equal values, which rounding would hide."""
    if np.ptp(sample) == 0:
        return 0.0
    return float(np.std(sample, ddof=1) / math.sqrt(len(sample)))


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
