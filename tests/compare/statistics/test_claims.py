"""Verdicts: where the whole interval lies against the threshold, and what is refused."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from syncbn.compare.statistics.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, judge
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError

SEEDS = list(range(6))
LOW = [0.050, 0.052, 0.048, 0.051, 0.049, 0.050]
HIGH = [0.350, 0.352, 0.341, 0.360, 0.349, 0.345]


def claim(kind: str = "less", threshold: float = -0.2, **more) -> ClaimConfig:
    settings = {"name": "c", "arm": "a", "against": "b", "kind": kind, "threshold": threshold}
    return ClaimConfig(**({"metric": "test_error"} | settings | more))


def verdict(a, b, *, metric="test_error", **more):
    return judge([claim(metric=metric, **more)], {"a": {metric: a}, "b": {metric: b}}, SEEDS)[0]


@pytest.mark.parametrize(
    ("kind", "threshold", "word"),
    [
        ("less", -0.2, REPRODUCED),
        ("less", -0.3, INCONCLUSIVE),
        ("less", -0.4, NOT_REPRODUCED),
        ("greater", -0.4, REPRODUCED),
        ("greater", -0.3, INCONCLUSIVE),
        ("greater", -0.2, NOT_REPRODUCED),
    ],
)
def test_a_claim_is_judged_by_where_its_whole_interval_lies(kind, threshold, word):
    assert verdict(LOW, HIGH, kind=kind, threshold=threshold).verdict == word


def test_an_effect_past_the_threshold_with_a_small_p_is_not_enough_without_its_interval():
    differences = np.subtract(LOW, HIGH)
    error = differences.std(ddof=1) / math.sqrt(len(SEEDS))
    v = verdict(LOW, HIGH, threshold=float(differences.mean() + student.ppf(0.96, 5) * error))
    assert v.p == pytest.approx(0.04)
    assert v.effect < v.claim.threshold < v.interval.high
    assert v.verdict == INCONCLUSIVE


def test_verdict_carries_effect_interval_pairs_and_number_of_seeds():
    v = verdict(LOW, HIGH)
    assert v.effect == pytest.approx(-0.2975, abs=0.005)
    assert v.interval.low < v.effect < v.interval.high < -0.2
    assert v.pairs == pytest.approx([a - b for a, b in zip(LOW, HIGH, strict=True)])
    assert (v.n, v.interval90) == (6, None)


@pytest.mark.parametrize(
    ("shift", "noise", "word"),
    [
        (0.0, 0.001, REPRODUCED),
        (0.019, 0.002, INCONCLUSIVE),
        (0.1, 0.001, NOT_REPRODUCED),
        (-0.1, 0.001, NOT_REPRODUCED),
        (0.0, 0.05, INCONCLUSIVE),
    ],
)
def test_equivalence_needs_both_one_sided_tests_and_is_refuted_outside_the_margin(
    shift, noise, word
):
    signs = (1, -1, 2, -2, 0.5, -0.5)
    moved = [x + shift + noise * sign for x, sign in zip(LOW, signs, strict=True)]
    v = verdict(moved, LOW, kind="equivalent", threshold=0.02)
    assert v.verdict == word
    assert v.interval90 is not None


def test_equal_arms_are_equivalent():
    assert verdict(LOW, LOW, kind="equivalent", threshold=0.01).verdict == REPRODUCED


def test_holms_correction_is_over_all_primary_claims():
    noisy = [0.30, 0.32, 0.31, 0.35, 0.27, 0.36]
    arms = {"a": {"test_error": LOW}, "b": {"test_error": noisy}}
    threshold = -0.225
    alone = judge([claim(threshold=threshold)], arms, SEEDS)[0]
    hopeless = [claim(threshold=-0.9, name=f"c{i}") for i in range(30)]
    # 30 more claims that all fail leave the first to pass at a 31st of the level.
    among = judge([claim(threshold=threshold), *hopeless], arms, SEEDS)[0]
    assert (alone.verdict, among.verdict) == (REPRODUCED, INCONCLUSIVE)
    assert among.p_holm == pytest.approx(31 * alone.p)
    assert "Holm" in among.note


def test_ratio_claims_are_judged_and_told_as_ratios():
    fast = [500.0, 520, 480, 510, 490, 505]
    slow = [9000.0, 8000, 9500, 8800, 9100, 8700]
    v = verdict(fast, slow, metric="steps_to_target", scale="ratio", threshold=0.2)
    assert v.verdict == REPRODUCED
    assert v.effect == pytest.approx(0.057, abs=0.003)
    assert v.pairs[0] == pytest.approx(500 / 9000)


def test_equivalence_of_a_ratio_reaches_as_far_down_as_up():
    for ratio, word in ((1.05, REPRODUCED), (1 / 1.05, REPRODUCED), (1.5, NOT_REPRODUCED)):
        v = verdict([ratio * x for x in LOW], LOW, scale="ratio", kind="equivalent", threshold=1.1)
        assert v.verdict == word


def test_a_censored_pair_leaves_the_claim_undecided_and_says_so():
    slow = [900.0, math.inf, 900, math.inf, 900, 900]
    v = verdict([500.0] * 6, slow, metric="steps_to_target", threshold=0.0)
    assert v.verdict == INCONCLUSIVE
    assert math.isnan(v.effect)
    assert "2 of 6 pairs" in v.note


def test_one_seed_decides_nothing():
    arms = {"a": {"test_error": [0.05]}, "b": {"test_error": [0.9]}}
    assert judge([claim()], arms, [0])[0].verdict == INCONCLUSIVE


def test_wild_ratios_of_two_seeds_do_not_overflow():
    arms = {"a": {"m": [1e-300, 1e300]}, "b": {"m": [1.0, 1.0]}}
    v = judge([claim(metric="m", scale="ratio", threshold=1.0)], arms, [0, 1])[0]
    assert (v.verdict, v.interval.high) == (INCONCLUSIVE, math.inf)


@pytest.mark.parametrize(
    ("arms", "complaint"),
    [
        ({"a": {"test_error": LOW}}, "arm 'b' has no 'test_error'"),
        ({"a": {"test_error": LOW}, "b": {"seconds": HIGH}}, "measured: seconds"),
        ({"a": {"test_error": LOW}, "b": {"test_error": HIGH[:5]}}, r"missing for seeds \[5\]"),
        (
            {"a": {"test_error": LOW}, "b": {"test_error": [None, *HIGH[1:]]}},
            r"missing for seeds \[0\]",
        ),
    ],
)
def test_a_gap_in_the_pairs_is_refused(arms, complaint):
    with pytest.raises(UsageError, match=complaint):
        judge([claim()], arms, SEEDS)
