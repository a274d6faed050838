"""Claims in words: effects with their unit, what was demanded, the evidence for a verdict, the finding."""

from dataclasses import asdict

import pytest

from syncbn.compare.report.words.claims import (
    comparison_words,
    effect_words,
    finding,
    interval_words,
    overall,
    tally,
    threshold_words,
    verdict_sentence,
)
from syncbn.compare.report.words.numbers import MINUS, NOTHING, TIMES
from syncbn.config import ClaimConfig

PLAIN = str.maketrans({MINUS: "-", TIMES: "x", NOTHING: "-"})
"""Typographic signs as a keyboard has them."""


def entry(**parts) -> dict:
    """A claim as the summary holds it."""
    settings = asdict(
        ClaimConfig("c", metric="test_error", arm="sync", against="local", threshold=-0.2)
    ) | {
        "effect": -0.3,
        "ci": [-0.4, -0.25],
        "n": 6,
        "p_holm": 0.001,
        "verdict": "REPRODUCED",
        "note": "",
    }
    return settings | parts


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"verdict": "NOT REPRODUCED", "ci": [-0.1, 0.0], "effect": -0.0001},
            "Test error, sync - local: 0.0 points, 95 % interval -10.0 to 0.0 points over 6 seeds. "
            "Claimed was below -20.0 points; the whole interval lies elsewhere.",
        ),
        (
            {"verdict": "INCONCLUSIVE", "kind": "greater", "threshold": 0.01, "effect": 0.02},
            "Test error, sync - local: +2.0 points, 95 % interval -40.0 to -25.0 points over 6 "
            "seeds. Claimed was above +1.0 points; these seeds cannot tell.",
        ),
        (
            {"kind": "equivalent", "threshold": 0.02, "effect": 0.001, "ci": [-0.01, 0.012]},
            "Test error, sync - local: +0.1 points, 95 % interval -1.0 to +1.2 points over 6 "
            "seeds. Both one-sided tests put it within ±2.0 points, as claimed (p = 0.001).",
        ),
        (
            {
                "verdict": "INCONCLUSIVE",
                "effect": None,
                "ci": [None, None],
                "note": "1 of 6 pairs are censored or not finite",
                "metric": "steps_to_target",
                "scale": "ratio",
                "threshold": 0.5,
            },
            "Number of steps to the target, sync / local: no effect can be given. Claimed was below x0.500; "
            "undecided, because 1 of 6 pairs are censored or not finite.",
        ),
        (
            {"metric": "seconds", "scale": "ratio", "kind": "equivalent", "threshold": 1.25}
            | {"effect": 1.1, "ci": [0.9, 1.2]},
            "Wall time, sync / local: x1.10, 95 % interval x0.900 to x1.20 over 6 seeds. Both "
            "one-sided tests put it within x0.800 to x1.25, as claimed (p = 0.001).",
        ),
    ],
)
def test_a_verdict_reads_as_a_sentence(parts, sentence):
    assert verdict_sentence(entry(**parts)).translate(PLAIN) == sentence


def test_a_tally_counts_every_verdict_and_admits_that_nothing_was_claimed():
    words = ["REPRODUCED", "NOT REPRODUCED", "INCONCLUSIVE", "INCONCLUSIVE"]
    claims = [entry(verdict=word) for word in words]
    assert tally(claims) == "1 of 4 claims reproduced, 1 not reproduced, 2 inconclusive"
    assert tally([]) == "No claim was declared"


TREND = {"along": ["local", "group_2", "sync"], "arm": "", "against": None, "threshold": 0.0}


@pytest.mark.parametrize(
    ("parts", "compared", "demanded"),
    [
        ({"threshold": 0.0}, "test error, sync - local", "below 0"),
        ({"against": None, "threshold": 0.035}, "test error, sync", "below 3.5 %"),
        (
            {"against": None, "kind": "within", "range": [0.1, 0.25]},
            "test error, sync",
            "between 10.0 and 25.0 %",
        ),
        (
            {"kind": "different", "threshold": 0.01},
            "test error, sync - local",
            "other than 0, not within ±1.0 points",
        ),
        (
            {"kind": "different", "threshold": 0.0, "scale": "ratio"},
            "test error, sync / local",
            "other than x1",
        ),
        (
            {"beyond": ["none_l2", "none"], "threshold": 0.0, "kind": "greater"},
            "test error, (sync - local) - (none_l2 - none)",
            "above 0",
        ),
        (
            TREND | {"kind": "decreasing"},
            "test error, along local, group_2, sync",
            "falling along local, group_2, sync",
        ),
        (
            TREND | {"kind": "increasing", "threshold": 0.5},
            "test error, along local, group_2, sync",
            "rising along local, group_2, sync (tau beyond 0.500)",
        ),
        (
            {"scale": "share", "metric": "loss_range", "kind": "greater", "threshold": 0.8},
            "share of looks, range of the loss along the gradient, sync below local",
            "above 80.0 %",
        ),
        (
            {"in_every_seed": True, "threshold": 0.0},
            "test error, sync - local",
            "below 0 in every seed",
        ),
        (
            {"metric": "grad_norm/1@500", "scale": "ratio", "kind": "greater", "threshold": 10.0},
            "gradient norm of layer 1 at step 500, sync / local",
            "above x10.0",
        ),
        (
            {"metric": "oracle_gap_loss@0", "against": None, "threshold": 1e-12},
            "relative gap of the loss to one process at step 0, sync",
            "below 1e-12",
        ),
    ],
)
def test_every_kind_and_scale_says_what_is_compared_and_demanded(parts, compared, demanded):
    claim = entry(**parts)
    assert comparison_words(claim).translate(PLAIN) == compared
    assert threshold_words(claim).translate(PLAIN) == demanded


@pytest.mark.parametrize(
    ("parts", "conclusion"),
    [
        (
            TREND | {"kind": "decreasing"},
            "Page's test finds it falling along local, group_2, sync, as claimed (p = 0.001).",
        ),
        (
            {"in_every_seed": True, "threshold": 0.0},
            "It lies below 0 in every seed, as claimed (p = 0.001).",
        ),
        (
            {"in_every_seed": True, "threshold": 0.0, "verdict": "NOT REPRODUCED"},
            "Claimed was below 0 in every seed; some seed lies on the other side.",
        ),
        ({"kind": "different"}, "The whole interval lies beside 0, as claimed."),
        (
            {"kind": "different", "threshold": 0.01, "verdict": "NOT REPRODUCED"},
            "Claimed was other than 0, not within ±1.0 points; both one-sided tests put it within ±1.0 points.",
        ),
    ],
)
def test_a_conclusion_names_the_evidence(parts, conclusion):
    assert verdict_sentence(entry(**parts)).translate(PLAIN).endswith(conclusion)


MEDIANS = {"sync": 0.059, "local": 0.359, "group_2": 0.1}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"effect": -0.3},
            "Test error with synchronised batch norm is 30.0 points lower than with local batch norm "
            "(5.9 % against 35.9 %).",
        ),
        (
            {"effect": 0.3, "arm": "local", "against": "sync"},
            "Test error with local batch norm is 30.0 points higher than",
        ),
        (
            {"effect": 0.00001},
            "Test error with synchronised batch norm is that with local batch norm, to the digits shown",
        ),
        (
            {"effect": 0.2, "scale": "ratio"},
            "Test error with synchronised batch norm is 0.200 times that with local",
        ),
        ({"effect": 0.059, "against": None}, "Test error with synchronised batch norm: 5.9 %."),
        (
            TREND | {"effect": -1.0, "kind": "decreasing"},
            "Test error falls along local, group_2, sync (35.9 % to 5.9 %).",
        ),
        (
            {"effect": 0.9, "scale": "share", "metric": "loss_range"},
            "In 90.0 % of the looks, synchronised batch norm lies below local batch norm: range of the loss",
        ),
        (
            {"effect": None},
            "Test error, sync - local: no number can be given, as some seeds have none.",
        ),
    ],
)
def test_a_finding_is_one_plain_sentence(parts, sentence):
    assert finding(entry(**parts), MEDIANS).translate(PLAIN).startswith(sentence)


def test_an_interval_is_cut_at_the_bounds_of_its_number():
    trend = entry(**TREND | {"kind": "decreasing"})
    assert interval_words(trend, (-1.04, -0.891)).translate(PLAIN) == "-1.00 to -0.891"
    assert interval_words(entry(scale="share"), (0.87, 1.02)) == "87.0 to 100.0 %"
    assert interval_words(entry(), (-1.2, None)) == NOTHING


def test_secondary_claims_are_counted_apart():
    claims = [entry(), entry(verdict="NOT REPRODUCED", primary=False)]
    assert (
        tally(claims)
        == "1 of 1 claim reproduced; 0 of 1 secondary claim reproduced, 1 not reproduced"
    )


def test_a_study_has_one_verdict_only_where_its_primary_claims_share_it():
    no, secondary = entry(verdict="NOT REPRODUCED"), entry(verdict="INCONCLUSIVE", primary=False)
    assert overall([no, no, secondary]) == "NOT REPRODUCED"
    assert overall([no, entry()]) == "MIXED"
    assert overall([secondary]) == "NO CLAIM"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("exchange_bytes", 2048.0, "2.05 kB"),
        ("precise_gap", 0.021, "2.1 points"),
        ("step_ms", 3.21, "3.21 ms"),
    ],
)
def test_an_arms_own_value_has_its_unit_and_no_sign(metric, value, text):
    assert effect_words(entry(metric=metric, against=None), value) == text
