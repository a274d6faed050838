"""Effects, intervals and tests over seeds, held against published numbers and against rules."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import page_trend_test, ttest_1samp

from syncbn.compare.statistics import effects, significance
from syncbn.compare.statistics.effects import Interval

# Student (1908), extra hours of sleep under two drugs: R's `sleep`, t.test(paired = TRUE).
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

errors = st.integers(0, 1024).map(lambda k: k / 1024)
"""Dyadic fractions, whose differences are exact."""


def pairs(least: int = 3, most: int = 10) -> st.SearchStrategy:
    return st.lists(st.tuples(errors, errors), min_size=least, max_size=most).map(
        lambda rows: ([a for a, _ in rows], [b for _, b in rows])
    )


def test_paired_t_interval_and_p_match_the_published_sleep_data():
    differences = effects.paired_differences(SLEEP_2, SLEEP_1)
    interval = effects.t_interval(differences)
    assert (interval.low, interval.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert 2 * significance.p_below(-differences, 0) == pytest.approx(0.002833, abs=1e-6)


@pytest.mark.parametrize("bound", [-1.0, 0.0, 0.8, 3.0])
def test_one_sided_p_matches_scipy(bound):
    sample = effects.paired_differences(SLEEP_2, SLEEP_1)
    expected = ttest_1samp(sample, bound, alternative="less").pvalue
    assert significance.p_below(sample, bound) == pytest.approx(expected, rel=1e-9)


def test_effect_is_the_median_not_the_mean():
    assert effects.effect([0.0, 0.0, 9.0]).median == 0.0


@given(pairs(), st.integers(-64, 64))
def test_shifting_every_value_leaves_the_differences_unchanged(arms, shift):
    arm, against = arms
    moved = effects.paired_differences([a + shift for a in arm], [b + shift for b in against])
    assert moved.tolist() == effects.paired_differences(arm, against).tolist()


@settings(deadline=None, max_examples=25)
@given(pairs())
def test_swapping_the_arms_negates_effect_and_interval(arms):
    arm, against = arms
    there = effects.effect(effects.paired_differences(arm, against))
    back = effects.effect(effects.paired_differences(against, arm))
    assert back.median == -there.median
    mirrored = (-back.interval.high, -back.interval.low)
    assert mirrored == pytest.approx((there.interval.low, there.interval.high), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(pairs())
def test_interval_holds_the_effect_and_both_its_parts(arms):
    effect = effects.effect(effects.paired_differences(*arms))
    assert effect.interval.low <= effect.median <= effect.interval.high
    for part in (effect.bca, effect.t):
        assert effect.interval.low <= part.low
        assert part.high <= effect.interval.high


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [effects.effect(rng.normal(size=6)).interval for _ in range(300)]
    assert sum(i.low <= 0 <= i.high for i in intervals) >= 0.95 * 300


def test_same_values_give_the_same_interval_again():
    sample = np.array([0.1, 0.4, 0.2, 0.9, 0.3, 0.6])
    assert effects.bca_interval(sample) == effects.bca_interval(sample)


def test_bca_corrects_for_skew_where_the_t_interval_cannot():
    skewed = np.exp(np.random.default_rng(3).normal(size=40))
    bca = effects.bca_interval(skewed)
    median = float(np.median(skewed))
    assert bca.high - median > median - bca.low


def test_equal_differences_give_a_point_for_an_interval():
    assert effects.effect([0.25] * 6).interval == Interval(0.25, 0.25)


def test_two_values_fall_back_to_the_t_interval():
    assert effects.bca_interval(np.array([1.0, 2.0])) == effects.t_interval(np.array([1.0, 2.0]))


def test_degenerate_jackknife_falls_back_to_percentiles():
    interval = effects.bca_interval(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.0]))
    assert interval.low == 1.0
    assert 1.0 <= interval.high <= 2.0


def test_one_value_bounds_nothing_and_tests_nothing():
    assert effects.effect([0.3]).interval == Interval(-math.inf, math.inf)
    assert significance.p_below(np.array([0.3]), 5.0) == 1.0


def test_a_value_that_is_not_finite_leaves_no_effect():
    effect = effects.effect([0.1, math.nan, 0.2])
    assert math.isnan(effect.median)
    assert effect.interval == Interval(-math.inf, math.inf)


def test_pairs_need_a_value_a_seed_in_both_arms():
    with pytest.raises(ValueError, match="3 values against 2"):
        effects.paired_differences([1, 2, 3], [1, 2])


@given(pairs(least=3), st.floats(0.01, 1.0))
def test_tost_rejects_exactly_where_the_90_percent_interval_lies_inside(arms, margin):
    sample = effects.paired_differences(*arms)
    test = significance.tost(sample, margin)
    assume(min(abs(abs(test.interval.low) - margin), abs(abs(test.interval.high) - margin)) > 1e-9)
    inside = -margin < test.interval.low and test.interval.high < margin
    assert (test.p < 0.05) == inside


def test_tost_takes_the_worse_of_its_two_tests():
    sample = np.array(SLEEP_2) - np.array(SLEEP_1)
    worse = ttest_1samp(sample, 2.0, alternative="less").pvalue
    assert significance.tost(sample, 2.0).p == pytest.approx(worse, rel=1e-9)


@pytest.mark.parametrize(("difference", "p"), [(0.0, 0.0), (0.01, 0.0), (0.03, 1.0)])
def test_tost_on_equal_differences_decides_by_the_margin(difference, p):
    assert significance.tost(np.full(6, difference), 0.02).p == p


def test_holm_matches_the_worked_example():
    # Step-down by hand: 4 x .005, then max(.02, 3 x .01), max(.03, 2 x .03), max(.06, 1 x .04).
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferroni(p_values):
    corrected = significance.holm(p_values)
    by_p = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert by_p == sorted(by_p)
    assert min(corrected) == min(1.0, len(p_values) * min(p_values))
    assert all(p <= c <= 1.0 for p, c in zip(p_values, corrected, strict=True))


def test_ratios_are_symmetric_on_the_log_scale():
    logs = effects.paired_log_ratios([2.0, 1.0], [1.0, 2.0])
    assert logs.sum() == pytest.approx(0.0)
    assert math.exp(effects.effect(effects.paired_log_ratios([3, 3], [1, 1])).median) == (
        pytest.approx(3.0)
    )


def test_ratio_of_what_is_not_positive_is_no_number():
    assert np.isnan(effects.paired_log_ratios([0.0, 1.0], [1.0, -1.0])).all()


@pytest.mark.parametrize(
    ("steps", "reached", "median"),
    [
        ([100, 200, 300], 3, 200),
        ([100, math.inf, 300], 2, 300),
        ([100, math.inf, math.inf], 1, None),
        ([100, 200, math.inf, math.inf], 2, None),
        ([], 0, None),
    ],
)
def test_censored_runs_count_but_are_never_averaged(steps, reached, median):
    found = effects.steps_to_target(steps)
    assert (found.reached, found.total, found.median) == (reached, len(steps), median)


def test_band_is_the_middle_95_percent_at_each_step():
    curves = np.linspace(0, 100, 101)[:, None] + np.array([[0.0, 1000.0]])
    low, middle, high = effects.band(curves)
    assert low == pytest.approx([2.5, 1002.5])
    assert middle == pytest.approx([50, 1050])
    assert high == pytest.approx([97.5, 1097.5])


def test_rank_statistics_agree_with_their_definitions():
    assert significance.kendall(np.array([1.0, 2.0, 3.0])) == 1
    assert significance.kendall(np.array([2.0, 2.0, 2.0])) == 0
    assert math.isnan(significance.kendall(np.array([1.0, math.inf])))
    assert significance.p_trend(np.ones((1, 4))) == 1  # one seed tests nothing
    assert significance.p_trend(np.full((6, 4), math.nan)) == 1
    assert significance.p_sign(5, 6) == pytest.approx(7 / 64)
    assert significance.p_sign(0, 0) == 1


def test_pages_test_agrees_with_his_published_example():
    # Page 1963, as Siegel & Castellan (1988, table 7.6) and scipy's documentation quote it: L = 133.5.
    table = [
        [3, 4, 3], [2, 2, 4], [3, 3, 5], [1, 3, 2], [2, 3, 2], [2, 4, 5], [1, 2, 4], [3, 4, 4],
        [2, 4, 5], [1, 3, 4],
    ]  # fmt: skip
    assert page_trend_test(table).statistic == 133.5
    assert significance.p_trend(np.array(table, dtype=float)) == pytest.approx(
        0.0018191161948127822
    )
