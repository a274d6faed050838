"""From a declared claim and one number a seed and arm to a verdict.

The decision that shaped the file: a claim is judged by where its whole 95 % interval lies against
the threshold declared before the run, never by the effect alone, and a study with several claims
pays for it (Holm). What the seeds cannot tell is INCONCLUSIVE, and a comparison with a gap in its
pairs is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from syncbn.compare import statistics
from syncbn.compare.statistics import Effect, Floats, Interval
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError

REPRODUCED = "REPRODUCED"
NOT_REPRODUCED = "NOT REPRODUCED"
INCONCLUSIVE = "INCONCLUSIVE"
LEVEL = 0.05
"""Largest p value, after Holm's correction over the study's claims, that counts as shown."""

Measurements = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Arm -> metric -> one value a seed: None where it is missing, infinity where it is censored."""


@dataclass(frozen=True)
class Verdict:
    """A claim, what was measured of it, and what follows.

    Effects, intervals and the threshold are in the metric's unit; on the ratio scale, ratios.
    """

    claim: ClaimConfig
    verdict: str
    effect: float
    """Median over seeds of the paired differences or ratios; NaN where some pair is not finite."""
    interval: Interval
    """95 %: the hull of the BCa bootstrap's and the paired t interval."""
    interval90: Interval | None
    """The 90 % paired t interval that the two one-sided tests amount to (`equivalent` only)."""
    n: int
    p: float
    """Of the one-sided paired t test against the threshold, or of TOST."""
    p_holm: float
    """`p` after Holm's correction over all claims of the study."""
    pairs: list[float]
    """The paired difference or ratio of each seed, in their order; not finite where censored."""
    note: str
    """Why the verdict is not what the interval alone suggests, or empty."""


@dataclass(frozen=True)
class _Measured:
    """A claim's pairs on the scale they are tested on: differences, or logarithms of ratios."""

    claim: ClaimConfig
    sample: Floats
    threshold: float
    effect: Effect
    p: float
    interval90: Interval | None


def judge(claims: Sequence[ClaimConfig], arms: Measurements, seeds: Sequence[int]) -> list[Verdict]:
    """Verdicts on `claims`, in their order.

    Raises:
        UsageError: an arm, its metric or the value of some seed is missing.
    """
    measured = [_measure(claim, _pairs(claim, arms, seeds)) for claim in claims]
    corrected = statistics.holm([m.p for m in measured])
    return [_verdict(m, p_holm, len(claims)) for m, p_holm in zip(measured, corrected, strict=True)]


def _pairs(claim: ClaimConfig, arms: Measurements, seeds: Sequence[int]) -> Floats:
    """The claim's differences or log ratios, one a seed."""
    values = [_values(claim, name, arms, seeds) for name in (claim.arm, claim.against)]
    if claim.scale == "ratio":
        return statistics.paired_log_ratios(*values)
    return statistics.paired_differences(*values)


def _values(claim: ClaimConfig, arm: str, arms: Measurements, seeds: Sequence[int]) -> list[float]:
    metrics = arms.get(arm, {})
    if claim.metric not in metrics:
        known = ", ".join(metrics) or "nothing"
        raise UsageError(
            f"claim {claim.name!r}: arm {arm!r} has no {claim.metric!r}; measured: {known}"
        )
    values = metrics[claim.metric]
    missing = [seed for seed, value in zip(seeds, values, strict=False) if value is None]
    missing += seeds[len(values) :]
    if missing:
        raise UsageError(
            f"claim {claim.name!r}: {claim.metric!r} of arm {arm!r} is missing for seeds "
            f"{missing}: pairs need every seed in both arms"
        )
    return [value for value in values if value is not None]


def _measure(claim: ClaimConfig, sample: Floats) -> _Measured:
    threshold = math.log(claim.threshold) if claim.scale == "ratio" else claim.threshold
    effect = statistics.effect(sample)
    if claim.kind == "equivalent":
        test = statistics.tost(sample, threshold)
        return _Measured(claim, sample, threshold, effect, test.p, test.interval)
    sign = _sign(claim)
    p = statistics.p_below(sign * sample, sign * threshold)
    return _Measured(claim, sample, threshold, effect, p, None)


def _sign(claim: ClaimConfig) -> int:
    """-1 for `greater`, which is `less` with both sides negated."""
    return -1 if claim.kind == "greater" else 1


def _verdict(measured: _Measured, p_holm: float, num_claims: int) -> Verdict:
    """The verdict, with effect and intervals back on the scale of the claim."""
    word, note = _decide(measured, p_holm, num_claims)
    ratio = measured.claim.scale == "ratio"
    bounds90 = measured.interval90
    return Verdict(
        claim=measured.claim,
        verdict=word,
        effect=_back(measured.effect.median, ratio),
        interval=_back_both(measured.effect.interval, ratio),
        interval90=None if bounds90 is None else _back_both(bounds90, ratio),
        n=measured.effect.n,
        p=measured.p,
        p_holm=p_holm,
        pairs=[_back(value, ratio) for value in measured.sample.tolist()],
        note=note,
    )


def _decide(measured: _Measured, p_holm: float, num_claims: int) -> tuple[str, str]:
    """The word for what interval and corrected test say together, and a note where they part."""
    if not np.isfinite(measured.sample).all():
        gaps = int((~np.isfinite(measured.sample)).sum())
        return INCONCLUSIVE, f"{gaps} of {len(measured.sample)} pairs are censored or not finite"
    holds, contradicted = _positions(measured)
    if contradicted:
        return NOT_REPRODUCED, ""
    if holds and p_holm <= LEVEL:
        return REPRODUCED, ""
    if holds:
        return INCONCLUSIVE, f"p = {p_holm:.3f} after Holm's correction over {num_claims} claims"
    return INCONCLUSIVE, ""


def _positions(measured: _Measured) -> tuple[bool, bool]:
    """Whether the evidence lies wholly where the claim says, and whether wholly elsewhere."""
    interval, threshold = measured.effect.interval, measured.threshold
    if measured.claim.kind == "equivalent":
        outside = interval.low > threshold or interval.high < -threshold
        return measured.p <= LEVEL, outside
    sign = _sign(measured.claim)
    low, high = sorted((sign * interval.low, sign * interval.high))
    return high < sign * threshold, low > sign * threshold


def _back(value: float, ratio: bool) -> float:
    """`value` on the claim's own scale; what is not finite stays so, also as a logarithm."""
    with np.errstate(over="ignore"):
        return float(np.exp(value)) if ratio and math.isfinite(value) else value


def _back_both(interval: Interval, ratio: bool) -> Interval:
    return Interval(_back(interval.low, ratio), _back(interval.high, ratio))
