"""Two launches of one study: what counts as worse, what is noise, what cannot be compared."""

import copy
import json

import numpy as np
import pytest

from syncbn.cli import cli
from syncbn.cli.guard import invoke
from syncbn.compare.regression import (
    BETTER,
    CANNOT_TELL,
    SAME,
    WORSE,
    compare,
    default_metric,
    differences,
    metric_of,
)
from syncbn.compare.report.words.regression import text, to_dict
from syncbn.errors import UsageError

SEEDS = list(range(6))
NOISE = np.array([0.004, -0.003, 0.001, -0.004, 0.003, -0.001])
LOCAL, SYNC = 0.30 + NOISE, 0.06 + NOISE[::-1]


def summary(local=LOCAL, sync=SYNC, **more):
    """A study of two arms; `more` goes into its design."""
    seeds = more.pop("seeds", SEEDS)
    verdict = more.pop("verdict", "REPRODUCED")
    design = {"data": "digits", "model": "mlp", "world_size": 2, "per_rank_batch": 2, "steps": 600,
              "seeds": seeds, "split": "test", "primary_metric": "test_error"}  # fmt: skip
    claim = {"name": "sync_beats_local", "arm": "sync", "against": "local", "metric": "test_error",
             "threshold": -0.2, "verdict": verdict}  # fmt: skip
    return {
        "study": "demo",
        "git": more.pop("git", "aaa"),
        "versions": {"torch": "2.15.0"},
        "design": design | more,
        "arms": {"local": _arm(local), "sync": _arm(sync)},
        "claims": [claim],
    }


def _arm(errors):
    values = [None if e is None else float(e) for e in errors]
    zeros = [0.0] * len(values)
    return {"test_error": values, "seconds": [1.0 + i / 50 for i in SEEDS][: len(values)],
            "diverged": zeros}  # fmt: skip


def changes(base, new, margin=0.0, metrics=("test_error",)):
    found = compare(base, new, [metric_of(metric) for metric in metrics], margin)
    return {change.arm: change for change in found.changes}


def test_launches_with_the_same_numbers_are_the_same():
    found = compare(summary(), summary())
    assert [change.verdict for change in found.changes] == [SAME, SAME]
    assert not found.worse


def test_a_change_beyond_noise_is_worse_in_its_arm_alone():
    found = changes(summary(), summary(sync=SYNC + 0.03 + NOISE / 3))
    assert (found["local"].verdict, found["sync"].verdict) == (SAME, WORSE)
    assert found["sync"].effect == pytest.approx(0.03, abs=0.001)
    assert found["sync"].n == 6


def test_a_change_within_noise_is_not_called_worse():
    found = compare(summary(), summary(sync=SYNC + 0.002 + 3 * NOISE))
    assert found.changes[1].verdict == CANNOT_TELL
    assert found.changes[1].effect > 0
    assert not found.worse


def test_a_change_for_the_better_is_reported_and_is_no_regression():
    found = compare(summary(), summary(local=LOCAL - 0.1 + NOISE / 3))
    assert found.changes[0].verdict == BETTER
    assert not found.worse


@pytest.mark.parametrize(("margin", "verdict"), [(0.02, WORSE), (0.03, CANNOT_TELL), (0.05, SAME)])
def test_a_change_for_the_worse_up_to_the_margin_is_accepted(margin, verdict):
    worse = summary(sync=SYNC + 0.03 + NOISE / 3)
    assert changes(summary(), worse, margin)["sync"].verdict == verdict


def test_holms_correction_is_over_all_arms_compared():
    shifted = SYNC + 0.004 + NOISE
    alone = {"sync": _arm(SYNC)}, {"sync": _arm(shifted)}
    quiet = {f"arm{i}": _arm(LOCAL) for i in range(20)}
    one = changes({**summary(), "arms": alone[0]}, {**summary(), "arms": alone[1]})["sync"]
    many = changes(
        {**summary(), "arms": alone[0] | quiet}, {**summary(), "arms": alone[1] | quiet}
    )["sync"]
    assert one.interval == many.interval
    assert (one.verdict, many.verdict) == (WORSE, CANNOT_TELL)
    assert many.p_holm == pytest.approx(21 * one.p_holm)
    assert "Holm" in many.note


def test_a_seed_that_lost_its_number_is_worse_and_never_averaged():
    lost = [*SYNC[:5], None]
    found = changes(summary(), summary(sync=lost))["sync"]
    assert (found.verdict, found.n, found.effect) == (WORSE, 5, 0.0)
    assert "seeds [5]" in found.note


def test_a_seed_that_diverges_now_is_worse_though_its_error_is_a_number():
    new = summary(sync=[*SYNC[:5], 1.0])
    new["arms"]["sync"]["diverged"][5] = 1.0
    found = changes(summary(), new)["sync"]
    assert found.verdict == WORSE
    assert "seeds [5] diverged" in found.note


def test_a_seed_that_never_had_a_number_is_left_out_and_named():
    holes = [*SYNC[:5], None]
    found = changes(summary(sync=holes), summary(sync=holes))["sync"]
    assert (found.verdict, found.n) == (SAME, 5)
    assert "seeds [5] have no number in either" in found.note


def test_only_seeds_that_both_launches_have_are_paired():
    new = summary(LOCAL[2:], SYNC[2:], seeds=SEEDS[2:])
    found = compare(summary(), new)
    assert found.seeds == [2, 3, 4, 5]
    assert [change.verdict for change in found.changes] == [SAME, SAME]


def test_a_claim_that_is_no_longer_reproduced_is_worse():
    found = compare(summary(), summary(verdict="INCONCLUSIVE"))
    assert found.worse == ["claim 'sync_beats_local' (REPRODUCED -> INCONCLUSIVE)"]


def test_a_claim_undecided_over_fewer_seeds_is_reported_but_does_not_count_as_worse():
    fewer = {"seeds": SEEDS[:3], "local": LOCAL[:3], "sync": SYNC[:3]}
    found = compare(summary(), summary(verdict="INCONCLUSIVE", **fewer))
    assert not found.worse
    assert "fewer seeds" in text(found, [])
    assert compare(summary(), summary(verdict="NOT REPRODUCED", **fewer)).worse


def test_a_claim_that_is_gone_or_declared_otherwise_is_named():
    gone, otherwise = summary(), summary(verdict="INCONCLUSIVE")
    gone["claims"] = []
    otherwise["claims"][0]["threshold"] = -0.4
    assert "not declared" in compare(summary(), gone).worse[0]
    assert compare(summary(), otherwise).claims[0].note == "threshold was -0.2, is -0.4"


def test_the_better_direction_of_a_metric_is_known_or_has_to_be_given():
    assert [metric_of(m).lower_is_better for m in ("train_loss", "accuracy")] == [True, False]
    assert not metric_of("shift_slope:higher").lower_is_better
    with pytest.raises(UsageError, match="shift_slope:lower or shift_slope:higher"):
        metric_of("shift_slope")
    with pytest.raises(UsageError, match="NAME:lower"):
        metric_of("shift_slope:up")


def test_a_fall_of_a_metric_that_should_be_high_is_worse():
    base, new = summary(), summary()
    base["arms"]["sync"]["accuracy"] = [0.9 + e for e in NOISE]
    new["arms"]["sync"]["accuracy"] = [0.8 + e for e in NOISE / 2]
    found = changes(base, new, metrics=("accuracy",))
    assert list(found) == ["sync"]
    assert (found["sync"].verdict, found["sync"].effect < 0) == (WORSE, True)


@pytest.mark.parametrize(
    ("primary", "default"),
    [("cells_trained", "cells_trained"), ("seconds", "test_error"), ("step_ms", "test_error"),
     ("shift_slope", "test_error"), (None, "test_error")],
)  # fmt: skip
def test_the_primary_metric_is_compared_by_default_unless_it_is_a_time(primary, default):
    assert default_metric(summary(primary_metric=primary)).name == default


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"study": "other"}, "study is 'demo' in the base and 'other'"),
        ({"design": {"data": "mnist"}}, "design.data is 'digits' in the base and 'mnist'"),
        ({"design": {"per_rank_batch": 4}}, "design.per_rank_batch is 2 in the base and 4"),
        ({"arms": {"local": _arm(LOCAL)}}, r"arms is \['local', 'sync'\] in the base"),
        ({"design": {"seeds": [5, 6, 7, 8, 9, 10]}}, r"share the seeds \[5\]"),
    ],
)
def test_summaries_of_two_studies_are_refused_with_both_values(change, complaint):
    new = copy.deepcopy(summary())
    for key, value in change.items():
        new[key] = new[key] | value if key == "design" else value
    with pytest.raises(UsageError, match=complaint):
        compare(summary(), new)


def test_a_metric_that_was_not_measured_is_refused_with_those_that_were():
    with pytest.raises(UsageError, match="'steps_to_target' is not measured in demo: test_error"):
        changes(summary(), summary(), metrics=("steps_to_target",))


def test_an_older_summary_without_new_keys_can_be_compared():
    assert not compare(summary(), summary(virtual=False, tier="full", grid={})).worse


def test_other_revisions_and_versions_are_listed():
    new = summary(git="bbb")
    new["versions"] = {"torch": "2.16.0"}
    assert differences(summary(), new) == ["revision: aaa -> bbb", "torch: 2.15.0 -> 2.16.0"]


def test_a_regression_says_the_same_as_json_and_as_text():
    found = compare(summary(), summary(sync=SYNC + 0.03 + NOISE / 3))
    plain = to_dict(found, [])
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["worse"]
    assert plain["conclusion"] in text(found, [])
    assert "+3.0 points" in text(found, [])


@pytest.fixture
def folders(tmp_path):
    def write(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def test_the_verb_exits_with_9_where_it_got_worse_and_0_within_noise(folders, capsys):
    base = folders("a", summary())
    noisy = folders("b", summary(sync=SYNC + 0.002 + 3 * NOISE))
    worse = folders("c", summary(sync=SYNC + 0.03 + NOISE / 3))
    assert invoke(cli, ["compare-to", base, noisy]) == 0
    capsys.readouterr()
    assert invoke(cli, ["compare-to", base, worse, "--json"]) == 9
    said = capsys.readouterr()
    assert json.loads(said.out)["worse"]
    assert said.err.count("\n") == 1
    assert "test_error of arm 'sync'" in said.err
