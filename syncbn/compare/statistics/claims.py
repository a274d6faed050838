"""From a declared claim and one number a seed to a verdict.

What a claim compares (a difference, a ratio, a share, an interaction or a trend) is paired within its seed first, and
only those numbers reach a test: no verdict loses the pairing. A claim is judged by where its whole 95 % interval lies
against the threshold declared before the run, never by the effect alone, and the primary claims of a study are
corrected for being several (Holm). What the seeds leave open is INCONCLUSIVE; a claim with a missing value is refused.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from syncbn.compare.statistics import effects, significance
from syncbn.compare.statistics.effects import Effect, Floats, Interval
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError

REPRODUCED = "REPRODUCED"
NOT_REPRODUCED = "NOT REPRODUCED"
INCONCLUSIVE = "INCONCLUSIVE"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)
LEVEL = 0.05
"""Largest p value, after Holm's correction over the study's primary claims, that counts as shown."""

Measurements = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Arm -> metric -> one value a seed: None where it is missing, infinity where it is censored."""

Curve = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class _Evidence:
    """What the trials of a study measured."""

    arms: Measurements
    seeds: Sequence[int]
    curves: Mapping[str, Mapping[str, Sequence[Curve]]] = field(default_factory=dict)
    """Arm -> metric -> one curve a seed, for claims on shares of the looks during training."""


@dataclass(frozen=True)
class Verdict:
    """A claim, what was measured of it, and what follows.

    Effects, intervals and the threshold are in the metric's unit; on the ratio scale, ratios.
    """

    claim: ClaimConfig
    verdict: str
    effect: float
    """Median over seeds of the paired numbers; NaN where some pair is not finite."""
    interval: Interval
    """95 %: the hull of the BCa bootstrap's and the paired t interval."""
    interval90: Interval | None
    """The 90 % paired t interval that the two one-sided tests amount to (`equivalent` only)."""
    n: int
    p: float
    """Of the test that belongs to the claim's kind, see `TESTS`."""
    p_holm: float
    """`p` after Holm's correction over the study's primary claims; of a secondary claim `p` itself."""
    pairs: list[float]
    """The paired number of each seed, in their order; not finite where censored."""
    note: str
    """Why the verdict is not what the interval alone suggests, or empty."""


@dataclass(frozen=True)
class _Sample:
    """A claim's pairs on the scale they are tested on, differences or logarithms of ratios, and what bounds them."""

    claim: ClaimConfig
    values: Floats
    effect: Effect
    rows: Floats
    """For trends: the metric along the arms, (seeds, arms); else empty."""

    @property
    def threshold(self) -> float:
        """The claim's, on the same scale."""
        ratio = self.claim.scale == "ratio" and self.claim.threshold > 0
        return math.log(self.claim.threshold) if ratio else self.claim.threshold


@dataclass(frozen=True)
class _TestResult:
    """The p value, and whether the evidence lies wholly where the claim says, or wholly elsewhere."""

    p: float
    holds: bool
    contradicted: bool
    interval90: Interval | None = None


def judge(
    claims: Sequence[ClaimConfig],
    arms: Measurements,
    seeds: Sequence[int],
    curves: Mapping[str, Mapping[str, Sequence[Curve]]] | None = None,
) -> list[Verdict]:
    """Verdicts on `claims`, in their order.

    Raises:
        UsageError: an arm, its metric or the value of some seed is missing.
    """
    evidence = _Evidence(arms, seeds, curves or {})
    samples = [_sample(claim, evidence) for claim in claims]
    results = [_test(sample) for sample in samples]
    primary = [i for i, claim in enumerate(claims) if claim.primary]
    corrected = dict(zip(primary, significance.holm([results[i].p for i in primary]), strict=True))
    return [
        _verdict(sample, result, corrected.get(i, result.p), len(primary))
        for i, (sample, result) in enumerate(zip(samples, results, strict=True))
    ]


def _sample(claim: ClaimConfig, evidence: _Evidence) -> _Sample:
    values = _paired(claim, evidence)
    rows = _ranked(claim, evidence) if claim.along else np.empty((0, 0))
    return _Sample(claim, values, effects.effect(values), rows)


def _paired(claim: ClaimConfig, evidence: _Evidence) -> Floats:
    """The claim's number of each seed, on the scale it is tested on: ratios as logarithms.

    Raises:
        UsageError: an arm, its metric or the value of some seed is missing.
    """
    if claim.along:
        return _trend(claim, evidence)
    if claim.scale == "share":
        return _shares(claim, evidence)
    found = _contrast(claim, evidence, claim.arm, claim.against)
    if claim.beyond:
        found = found - _contrast(claim, evidence, *claim.beyond)
    return found


def _contrast(claim: ClaimConfig, evidence: _Evidence, arm: str, against: str | None) -> Floats:
    own = _values(claim, arm, evidence)
    if against is None:
        values = np.asarray(own, dtype=np.float64)
        return _logarithms(values) if claim.scale == "ratio" else values
    other = _values(claim, against, evidence)
    if claim.scale == "ratio":
        return effects.paired_log_ratios(own, other)
    return effects.paired_differences(own, other)


def _logarithms(values: Floats) -> Floats:
    positive = values > 0
    return np.where(positive, np.log(values, where=positive, out=np.zeros_like(values)), np.nan)


def _trend(claim: ClaimConfig, evidence: _Evidence) -> Floats:
    """Kendall's tau-b of the metric against the order of the arms, within each seed."""
    return np.array([significance.kendall(row) for row in _ranked(claim, evidence)])


def _ranked(claim: ClaimConfig, evidence: _Evidence) -> Floats:
    """The metric along the claim's arms, (seeds, arms), for a test of the trend."""
    return np.array([_values(claim, arm, evidence) for arm in claim.along], dtype=np.float64).T


def _shares(claim: ClaimConfig, evidence: _Evidence) -> Floats:
    """The share of the looks that both arms have at which `arm` lies below `against`; NaN without any."""
    one, other = (
        evidence.curves.get(arm or "", {}).get(claim.metric, ())
        for arm in (claim.arm, claim.against)
    )
    looks = itertools.zip_longest(one, other, fillvalue={})
    found = [_share_below(left, right) for left, right in looks]
    return np.array(found or [math.nan] * len(evidence.seeds))


def _share_below(one: Curve, other: Curve) -> float:
    shared = one.keys() & other.keys()
    return sum(one[step] < other[step] for step in shared) / len(shared) if shared else math.nan


def _values(claim: ClaimConfig, arm: str, evidence: _Evidence) -> list[float]:
    metrics = evidence.arms.get(arm, {})
    if claim.metric not in metrics:
        known = ", ".join(metrics) or "nothing"
        raise UsageError(
            f"claim {claim.name!r}: arm {arm!r} has no {claim.metric!r}; measured: {known}"
        )
    values = metrics[claim.metric]
    missing = [seed for seed, value in zip(evidence.seeds, values, strict=False) if value is None]
    missing += evidence.seeds[len(values) :]
    if missing:
        raise UsageError(
            f"claim {claim.name!r}: {claim.metric!r} of arm {arm!r} is missing for seeds "
            f"{missing}: pairs need every seed in both arms"
        )
    return [value for value in values if value is not None]


def _test(sample: _Sample) -> _TestResult:
    if sample.claim.in_every_seed:
        return _in_every_seed(sample)
    return TESTS[sample.claim.kind](sample)


def _less(sample: _Sample) -> _TestResult:
    """One-sided t test against the threshold."""
    interval, threshold = sample.effect.interval, sample.threshold
    p = significance.p_below(sample.values, threshold)
    return _TestResult(p, interval.high < threshold, interval.low > threshold)


def _greater(sample: _Sample) -> _TestResult:
    """The same from the other side."""
    interval, threshold = sample.effect.interval, sample.threshold
    p = significance.p_below(-sample.values, -threshold)
    return _TestResult(p, interval.low > threshold, interval.high < threshold)


def _equivalent(sample: _Sample) -> _TestResult:
    """Two one-sided t tests against the margin."""
    interval, margin = sample.effect.interval, sample.threshold
    test = significance.tost(sample.values, margin)
    outside = interval.low > margin or interval.high < -margin
    return _TestResult(test.p, test.p <= LEVEL, outside, test.interval)


def _within(sample: _Sample) -> _TestResult:
    """Two one-sided t tests against the ends of the range, and the whole interval inside it."""
    low, high = sample.claim.range
    if sample.claim.scale == "ratio":
        low, high = math.log(low), math.log(high)
    interval = sample.effect.interval
    p = max(significance.p_below(sample.values, high), significance.p_below(-sample.values, -low))
    inside = low <= interval.low and interval.high <= high
    return _TestResult(p, inside, interval.low > high or interval.high < low)


def _different(sample: _Sample) -> _TestResult:
    """Two-sided t test against no difference; contradicted where both one-sided tests put it within the margin."""
    interval, margin = sample.effect.interval, sample.threshold
    p = min(1.0, 2 * min(significance.p_below(sign * sample.values, 0.0) for sign in (1, -1)))
    negligible = margin > 0 and significance.tost(sample.values, margin).p <= LEVEL
    apart = interval.low > 0 or interval.high < 0
    return _TestResult(p, apart and not negligible, negligible)


def _increasing(sample: _Sample) -> _TestResult:
    """Page's test of an ordered alternative within seeds (Page 1963); the interval is that of Kendall's tau."""
    interval = sample.effect.interval
    p = significance.p_trend(sample.rows)
    return _TestResult(p, interval.low > sample.threshold, interval.high < sample.threshold)


def _decreasing(sample: _Sample) -> _TestResult:
    """The same with the order of the arms reversed."""
    interval, threshold = sample.effect.interval, -sample.threshold
    p = significance.p_trend(sample.rows[:, ::-1])
    return _TestResult(p, interval.high < threshold, interval.low > threshold)


def _in_every_seed(sample: _Sample) -> _TestResult:
    """Sign test: every seed lies on the claimed side of the threshold, or the claim does not hold."""
    sign = -1 if sample.claim.kind == "greater" else 1
    on_side = sign * sample.values < sign * sample.threshold
    p = significance.p_sign(int(on_side.sum()), len(on_side))
    return _TestResult(p, bool(on_side.all()), not on_side.all())


TESTS: dict[str, Callable[[_Sample], _TestResult]] = {
    "less": _less,
    "greater": _greater,
    "equivalent": _equivalent,
    "within": _within,
    "different": _different,
    "increasing": _increasing,
    "decreasing": _decreasing,
}
"""The test of each kind of claim."""


def _verdict(sample: _Sample, result: _TestResult, p_holm: float, num_primary: int) -> Verdict:
    """The verdict, with effect and intervals back on the scale of the claim."""
    word, note = _decide(sample, result, p_holm, num_primary)
    ratio = sample.claim.scale == "ratio"
    bounds90 = result.interval90
    return Verdict(
        claim=sample.claim,
        verdict=word,
        effect=_back(sample.effect.median, ratio),
        interval=_back_both(sample.effect.interval, ratio),
        interval90=None if bounds90 is None else _back_both(bounds90, ratio),
        n=sample.effect.n,
        p=result.p,
        p_holm=p_holm,
        pairs=[_back(value, ratio) for value in sample.values.tolist()],
        note=note,
    )


def _decide(
    sample: _Sample, result: _TestResult, p_holm: float, num_primary: int
) -> tuple[str, str]:
    """The word for what interval and corrected test say together, and a note where they part."""
    if not np.isfinite(sample.values).all():
        gaps = int((~np.isfinite(sample.values)).sum())
        return INCONCLUSIVE, f"{gaps} of {len(sample.values)} pairs are censored or not finite"
    if result.contradicted:
        return NOT_REPRODUCED, ""
    if result.holds and p_holm <= LEVEL:
        return REPRODUCED, ""
    if result.holds:
        family = f" after Holm's correction over {num_primary} claims"
        return INCONCLUSIVE, f"p = {p_holm:.3f}{family if sample.claim.primary else ''}"
    return INCONCLUSIVE, ""


def _back(value: float, ratio: bool) -> float:
    """`value` on the claim's own scale; what is not finite stays so, also as a logarithm."""
    with np.errstate(over="ignore"):
        return float(np.exp(value)) if ratio and math.isfinite(value) else value


def _back_both(interval: Interval, ratio: bool) -> Interval:
    return Interval(_back(interval.low, ratio), _back(interval.high, ratio))
