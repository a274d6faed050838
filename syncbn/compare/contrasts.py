"""What a claim speaks of, as one number a seed: a difference, a ratio, a share, an interaction or a trend.

The decision that shaped the file: whatever a claim compares is paired within its seed first, and only those numbers go
on to statistics; there is no way to a verdict that loses the pairing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from syncbn.compare import statistics
from syncbn.compare.statistics import Floats
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError

Measurements = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Arm -> metric -> one value a seed: None where it is missing, infinity where it is censored."""

Curve = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Evidence:
    """What the trials of a study measured."""

    arms: Measurements
    seeds: Sequence[int]
    curves: Mapping[str, Mapping[str, Sequence[Curve]]] = field(default_factory=dict)
    """Arm -> metric -> one curve a seed, for claims on shares of the looks during training."""


def pairs(claim: ClaimConfig, evidence: Evidence) -> Floats:
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


def _contrast(claim: ClaimConfig, evidence: Evidence, arm: str, against: str | None) -> Floats:
    own = _values(claim, arm, evidence)
    if against is None:
        values = np.asarray(own, dtype=np.float64)
        return _logarithms(values) if claim.scale == "ratio" else values
    other = _values(claim, against, evidence)
    if claim.scale == "ratio":
        return statistics.paired_log_ratios(own, other)
    return statistics.paired_differences(own, other)


def _logarithms(values: Floats) -> Floats:
    positive = values > 0
    return np.where(positive, np.log(values, where=positive, out=np.zeros_like(values)), np.nan)


def _trend(claim: ClaimConfig, evidence: Evidence) -> Floats:
    """Kendall's tau-b of the metric against the order of the arms, within each seed."""
    columns = np.array([_values(claim, arm, evidence) for arm in claim.along], dtype=np.float64)
    return np.array([statistics.kendall(row) for row in columns.T])


def ranked(claim: ClaimConfig, evidence: Evidence) -> Floats:
    """The metric along the claim's arms, (seeds, arms), for a test of the trend."""
    return np.array([_values(claim, arm, evidence) for arm in claim.along], dtype=np.float64).T


def _shares(claim: ClaimConfig, evidence: Evidence) -> Floats:
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


def _values(claim: ClaimConfig, arm: str, evidence: Evidence) -> list[float]:
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
