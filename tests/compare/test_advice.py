"""Advice: what is measured of groups of ranks becomes synchronise, do not, or cannot tell."""

import json

import numpy as np
import pytest

from syncbn.compare.advice import (
    AS_GOOD,
    CANNOT_TELL,
    DO_NOT,
    SYNCHRONISE,
    UNDECIDED,
    WORSE,
    advice,
    arms_by_size,
    cost_study,
    error_study,
    group_sizes,
)
from syncbn.compare.report.words.advice import NOT_MEASURED, text, to_dict
from syncbn.compose import compose
from syncbn.errors import UsageError

NOISE = 0.001 * np.array([1.0, -2, 3, -1, 0, 2, -3, 1])


def summary(wobble=1.0, virtual=True, **errors):
    """A study on eight ranks of two samples; each arm wobbles over its eight seeds in a way of its own."""
    arms = {
        arm: {"test_error": (error + wobble * np.roll(NOISE, i)).tolist(), "world_size": [1] * 8}
        for i, (arm, error) in enumerate(errors.items())
    }
    design = {"data": "mnist", "model": "mlp", "world_size": 8, "per_rank_batch": 2, "steps": 600,
              "seeds": list(range(8)), "virtual": virtual}  # fmt: skip
    return {"study": "advise", "design": design, "arms": arms, "claims": []}


def timed(metric="step_ms", wobble=0.01, **ratios):
    """A study of cost: each arm's time of a step, relative to local's."""
    found = summary(virtual=False, **dict.fromkeys(("local", *ratios), 0.1))
    for arm, ratio in ({"local": 1.0} | ratios).items():
        found["arms"][arm][metric] = (ratio * (2 + wobble * NOISE * 1000)).tolist()
    return found


CLEAR = {"local": 0.56, "group_2": 0.105, "group_4": 0.060, "sync": 0.058}


def test_a_clear_win_is_advised_over_the_smallest_group_as_good_as_any():
    found = advice(summary(**CLEAR))
    assert (found.verdict, found.group.arm, found.group.size) == (SYNCHRONISE, "group_4", 4)
    assert [group.standing for group in found.groups] == [WORSE, WORSE, AS_GOOD, AS_GOOD]
    assert found.gain.median == pytest.approx(0.50, abs=0.01)
    assert found.group_is_sure


def test_no_difference_within_the_margin_is_no_reason_to_synchronise():
    found = advice(summary(local=0.060, group_2=0.059, group_4=0.060, sync=0.058))
    assert (found.verdict, found.group.arm) == (DO_NOT, "local")
    assert "does as well as any group" in text(found, summary(**CLEAR))


def test_seeds_that_leave_the_answer_open_give_cannot_tell():
    noisy = summary(wobble=12, local=0.075, sync=0.060)
    found = advice(noisy)
    assert found.verdict == CANNOT_TELL
    assert found.groups[0].standing == UNDECIDED
    assert "these seeds leave open" in text(found, noisy)


def test_a_gain_that_may_or_may_not_exceed_the_margin_is_open():
    assert advice(summary(local=0.070, sync=0.060)).verdict == CANNOT_TELL
    assert advice(summary(local=0.070, sync=0.060), margin=0.002).verdict == SYNCHRONISE
    assert advice(summary(local=0.070, sync=0.060), margin=0.03).verdict == DO_NOT


def test_a_gain_that_costs_more_than_it_is_worth_is_not_advised():
    study = summary(local=0.09, sync=0.06)  # 3 points, worth 1.3 times the time at a tenth a point
    dear = advice(study, cost=timed(sync=1.8))
    assert (dear.verdict, dear.group.arm) == (DO_NOT, "local")
    assert dear.cost is not None
    assert dear.cost.worth == pytest.approx(1.3, abs=0.05)
    assert dear.cost.sure
    assert "costs more than that" in text(dear, study)
    assert advice(study, cost=timed(sync=1.1)).verdict == SYNCHRONISE
    assert advice(study, cost=timed(sync=1.8), point_worth=0.5).verdict == SYNCHRONISE


def test_a_cost_that_might_be_worth_it_is_said_to_be_open():
    study = summary(local=0.09, sync=0.06)
    found = advice(study, cost=timed(sync=1.31, wobble=0.3) | {"study": "c"})
    assert found.cost is not None
    assert not found.cost.sure
    assert "leave open which of the two is more" in text(found, study)


def test_a_group_that_is_better_than_all_ranks_is_advised_and_said_to_be():
    study = summary(local=0.30, group_2=0.10, group_4=0.050, sync=0.075)
    found = advice(study)
    assert (found.verdict, found.group.arm) == (SYNCHRONISE, "group_4")
    assert found.groups[-1].standing == WORSE
    assert "all ranks together do worse" in text(found, study)


def test_a_clear_gain_is_advised_even_where_groups_cannot_be_told_apart():
    study = summary(wobble=12, local=0.56, group_4=0.060, sync=0.062)
    found = advice(study)
    assert found.verdict == SYNCHRONISE
    assert not found.group_is_sure
    assert "which group is best, these seeds cannot tell" in text(found, study)


def test_cost_is_read_from_steps_or_else_from_whole_runs_or_said_to_be_unknown():
    study = summary(**CLEAR)
    by_step, by_run = timed(group_4=1.5), timed("seconds", group_4=1.5)
    for cost, metric in ((by_step, "step_ms"), (by_run, "seconds")):
        found = advice(study, cost=cost)
        assert found.cost is not None
        assert found.cost.metric == metric
        assert found.cost.ratio.median == pytest.approx(1.5)
    assert advice(study, cost=timed(sync=1.5)).cost is None  # not of the group it is about
    assert NOT_MEASURED in text(advice(study), study)


def test_the_text_of_an_advice_says_what_was_declared_and_what_was_measured():
    study = summary(**CLEAR)
    said = text(advice(study, margin=0.02, point_worth=0.05), study)
    assert said.startswith("SYNCHRONISE over groups of 4 ranks (8 samples)\n")
    for part in ("a margin of 2 points", "5 %", "8 seeds", "virtual ranks", "learning rate"):
        assert part in said


def test_an_advice_as_json_says_the_same_as_the_advice():
    found = to_dict(advice(summary(**CLEAR), cost=timed(group_4=1.5)), summary(**CLEAR))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["verdict"] == SYNCHRONISE
    assert found["group"]["size"] == 4


def test_advice_compares_only_arms_that_differ_in_who_shares_statistics():
    study = summary(sync=0.1, ghost=0.1, none=0.1, sync_group_4=0.1, local=0.1, big_batch=0.1)
    assert arms_by_size(study) == {"local": 1, "sync_group_4": 4, "sync": 8}
    study["arms"]["sync_group"] = study["arms"]["none"]
    study["design"]["normalisation_batch"] = {"sync_group": 4}
    assert arms_by_size(study)["sync_group"] == 2


@pytest.mark.parametrize(
    ("arms", "complaint"),
    [({"sync": 0.1, "none": 0.1}, "has the arms sync, none"), ({"local": 0.1}, "needs local, and")],
)
def test_advice_is_refused_without_local_and_a_synchronised_arm(arms, complaint):
    with pytest.raises(UsageError, match=complaint):
        advice(summary(**arms))


def test_advice_is_refused_where_a_seed_has_no_number():
    study = summary(local=0.3, sync=0.1)
    study["arms"]["sync"]["test_error"][3] = None
    with pytest.raises(UsageError, match="test_error of arm 'sync'"):
        advice(study)


def test_group_sizes_are_the_proper_divisors_of_the_world_size():
    assert group_sizes(8) == [2, 4]
    assert group_sizes(6) == [2, 3]
    assert group_sizes(2) == group_sizes(7) == []


def test_the_studies_of_error_and_cost_compose_with_the_users_settings():
    settings = ["model=cnn", "train.per_rank_batch=4", "launcher.num_workers=12"]
    errors = compose(error_study(settings, 12))
    assert errors.study is not None
    assert list(errors.study.arms) == ["local", "sync", "group_2", "group_3", "group_4", "group_6"]
    assert errors.study.arms["group_6"] == ["norm=sync_group", "norm.group_size=6"]
    assert (errors.model.name, errors.train.per_rank_batch, errors.train.virtual) == (
        "cnn",
        4,
        True,
    )
    cost = compose(cost_study(settings, errors.name, [4]))
    assert cost.study is not None
    assert list(cost.study.arms) == ["local", "sync", "group_4"]
    assert (cost.name, cost.train.virtual, cost.probe.names) == ("advise-cost", False, ["exchange"])
