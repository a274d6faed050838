"""Every kind and scale of claim: what makes it hold, what contradicts it, and what leaves it open."""

import numpy as np
import pytest
from scipy import stats

from syncbn.compare.statistics.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, judge
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError

SEEDS = list(range(6))
NOISE = np.array([1.0, -1.0, 2.0, -2.0, 0.5, -0.5])


def around(centre: float, spread: float = 0.001) -> list[float]:
    return list(centre + spread * NOISE)


def one(claim: ClaimConfig, arms: dict, curves: dict | None = None):
    table = {arm: {"m": values} for arm, values in arms.items()}
    return judge([claim], table, SEEDS, curves)[0]


@pytest.mark.parametrize(
    ("centre", "spread", "word"),
    [
        (0.17, 0.001, REPRODUCED),
        (0.30, 0.001, NOT_REPRODUCED),
        (0.05, 0.001, NOT_REPRODUCED),
        (0.25, 0.01, INCONCLUSIVE),
    ],
)
def test_a_claim_on_a_range_holds_where_the_whole_interval_lies_inside(centre, spread, word):
    claim = ClaimConfig("c", "a", metric="m", kind="within", range=[0.10, 0.25])
    assert one(claim, {"a": around(centre, spread)}).verdict == word


def test_a_claim_on_one_arm_is_tested_against_its_threshold_as_scipy_does():
    values = around(0.03)
    v = one(ClaimConfig("c", "a", metric="m", threshold=0.035), {"a": values})
    assert (v.verdict, v.pairs) == (REPRODUCED, pytest.approx(values))
    assert v.p == pytest.approx(stats.ttest_1samp(values, 0.035, alternative="less").pvalue)


@pytest.mark.parametrize(
    ("shift", "spread", "word"),
    [
        (0.02, 0.001, REPRODUCED),
        (-0.02, 0.001, REPRODUCED),
        (0.0, 0.001, NOT_REPRODUCED),
        (0.002, 0.0001, NOT_REPRODUCED),  # a difference, but none that matters
        (0.0, 0.02, INCONCLUSIVE),
    ],
)
def test_different_has_no_direction_and_is_refuted_by_equivalence(shift, spread, word):
    claim = ClaimConfig("c", "a", "b", metric="m", kind="different", threshold=0.005)
    assert one(claim, {"a": around(0.1 + shift, spread), "b": [0.1] * 6}).verdict == word


def test_different_is_a_two_sided_test():
    a = around(0.12, 0.01)
    claim = ClaimConfig("c", "a", "b", metric="m", kind="different", threshold=0.005)
    v = one(claim, {"a": a, "b": [0.1] * 6})
    assert v.p == pytest.approx(stats.ttest_1samp(np.array(a) - 0.1, 0).pvalue)


def test_an_interaction_is_a_difference_of_differences_within_each_seed():
    base = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # seeds differ a lot, and cancel
    arms = {
        "bn": list(base),
        "bn_drop": list(base + 0.01 + 0.001 * NOISE),
        "none": list(base + 0.1),
        "none_drop": list(base + 0.05),
    }
    claim = ClaimConfig(
        "c",
        "bn_drop",
        "bn",
        beyond=["none_drop", "none"],
        metric="m",
        kind="greater",
        threshold=0.03,
    )
    v = one(claim, arms)
    assert v.verdict == REPRODUCED
    assert v.effect == pytest.approx(0.06, abs=0.001)


def test_a_trend_is_ranked_within_each_seed_and_tested_as_page_did():
    levels = {"w": 0.4, "x": 0.3, "y": 0.2, "z": 0.1}
    arms = {arm: list(level + 0.5 * np.arange(6)) for arm, level in levels.items()}
    falling = ClaimConfig("c", metric="m", kind="decreasing", along=["w", "x", "y", "z"])
    v = one(falling, arms)
    assert (v.verdict, v.effect, v.pairs) == (REPRODUCED, -1.0, [-1.0] * 6)
    rows = np.array([arms[arm] for arm in ("z", "y", "x", "w")]).T
    assert v.p == pytest.approx(stats.page_trend_test(rows).pvalue)
    rising = ClaimConfig("c", metric="m", kind="increasing", along=["w", "x", "y", "z"])
    assert one(rising, arms).verdict == NOT_REPRODUCED


def test_a_claim_on_a_share_counts_the_looks_that_both_arms_have():
    looks = dict.fromkeys(range(10), 1.0)
    lower = {step: 0.5 if step < 9 else 2.0 for step in range(12)}
    curves = {"a": {"m": [lower] * 6}, "b": {"m": [looks] * 6}}
    claim = ClaimConfig("c", "a", "b", metric="m", kind="greater", scale="share", threshold=0.8)
    v = one(claim, {"a": [0.0] * 6, "b": [0.0] * 6}, curves)
    assert (v.verdict, v.pairs) == (REPRODUCED, [0.9] * 6)
    curves["b"] = {"m": [{}] * 6}
    assert one(claim, {"a": [0.0] * 6, "b": [0.0] * 6}, curves).verdict == INCONCLUSIVE


def test_a_claim_on_every_seed_is_lost_by_a_single_seed():
    claim = ClaimConfig("c", "a", "b", metric="m", in_every_seed=True)
    better = [0.1] * 6
    v = one(claim, {"a": better, "b": [0.2] * 6})
    assert (v.verdict, v.p) == (REPRODUCED, pytest.approx(0.5**6))
    assert one(claim, {"a": better, "b": [0.2] * 5 + [0.1]}).verdict == NOT_REPRODUCED


def test_secondary_claims_are_left_out_of_holms_correction():
    noisy = [0.30, 0.32, 0.31, 0.35, 0.27, 0.36]
    arms = {"a": {"m": around(0.05)}, "b": {"m": noisy}}
    first = ClaimConfig("first", "a", "b", metric="m", threshold=-0.225)
    others = [
        ClaimConfig(f"c{i}", "a", "b", metric="m", threshold=-0.9, primary=False) for i in range(30)
    ]
    verdicts = judge([first, *others], arms, SEEDS)
    assert verdicts[0].p_holm == verdicts[0].p
    assert verdicts[0].verdict == REPRODUCED
    assert verdicts[1].p_holm == verdicts[1].p


def test_a_missing_arm_of_a_trend_is_refused():
    claim = ClaimConfig("c", metric="m", kind="increasing", along=["a", "b", "gone"])
    with pytest.raises(UsageError, match="arm 'gone' has no 'm'"):
        one(claim, {"a": around(0.1), "b": around(0.2)})
