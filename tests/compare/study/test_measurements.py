"""What follows from the curves of trials: targets, steps to them, cells that trained, values at a step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.compare.measure import measure
from syncbn.compare.study import measurements
from syncbn.compare.study.design import Arm
from syncbn.compare.study.records import TrialRecord
from syncbn.config import (
    ClaimConfig,
    LauncherConfig,
    NormConfig,
    RunConfig,
    StudyConfig,
    TargetConfig,
    TrainConfig,
    TuneConfig,
)

ERROR = measure("test_error")


def trial(errors: dict[int, float], arm: str = "a", seed: int = 0, **final: float) -> TrialRecord:
    """A trial with that curve of test errors."""
    last = {"test_error": errors[max(errors)]} | final
    points = {"test_error": dict(errors)}
    return TrialRecord(arm, seed, {}, {}, "", last, max(errors), 1.0, 1, "samples", points)


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        ({10: 0.5, 20: 0.10, 30: 0.10}, 20),
        ({10: 0.5, 20: 0.08, 30: 0.30, 40: 0.09, 50: 0.104}, 40),  # a lucky dip does not count
        ({10: 0.5, 20: 0.4, 30: 0.09}, 30),  # the last has no next
        ({10: 0.5, 20: 0.4, 30: 0.11}, math.inf),  # censored at the budget
    ],
)
def test_a_target_is_reached_where_the_next_evaluation_stays_there(curve, steps):
    assert measurements.steps_to_target(trial(curve), 0.10, 0.005, ERROR) == steps


def test_the_best_error_that_an_arm_held_is_the_target_of_the_same_seed():
    arms = {"base": [trial({10: 0.3, 20: 0.2, 30: 0.26}), trial({10: 0.3, 20: 0.4, 30: 0.35})]}
    assert measurements.targets_of(TargetConfig(arm="base", tolerance=0.01), arms, 2, ERROR) == [
        0.25,
        0.35,
    ]
    assert measurements.targets_of(TargetConfig(error=0.1), arms, 2, ERROR) == [0.1, 0.1]
    assert measurements.targets_of(None, arms, 2, ERROR) is None


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), st.floats(0.0, 0.5))
def test_an_arm_reaches_the_target_that_it_sets(errors, tolerance):
    own = trial(dict(enumerate(errors)))
    target = TargetConfig(arm="base", tolerance=tolerance)
    (error,) = measurements.targets_of(target, {"base": [own]}, 1, ERROR)
    assert min(errors) <= error
    assert measurements.steps_to_target(own, error, tolerance, ERROR) < math.inf


def test_an_arms_table_has_its_targets_its_points_and_what_was_tuned():
    claims = [ClaimConfig("c", "a", metric="test_error@20")]
    study = StudyConfig(
        seeds=[0, 1],
        arms={"a": []},
        claims=claims,
        target=TargetConfig(error=0.3),
        tune=TuneConfig(key="optim.lr"),
    )
    own = [trial({10: 0.5, 20: 0.2}), trial({10: 0.9, 20: 0.8}, seed=1)]
    table = measurements.measure(study, {"a": own}, study.target, {"a": 0.1}, ERROR)["a"]
    assert table["steps_to_target"] == [20, math.inf]
    assert table["test_error@20"] == [0.2, 0.8]
    assert table["tuned_lr"] == [0.1, 0.1]
    assert table["best_error"] == [0.2, 0.8]


def test_a_diverged_trial_is_censored_where_it_measured_nothing():
    gone = trial({10: 1.0}, diverged=1.0)
    kept = trial({10: 0.5, 20: 0.2}, leak_gap=0.1)
    assert measurements.measurements_of([kept, gone], ["leak_gap"], ERROR)["leak_gap"] == [
        0.1,
        math.inf,
    ]
    assert measurements.at_step([kept, gone], "test_error@20") == [0.2, math.inf]
    assert measurements.at_step([kept], "test_error@15") == [None]


def test_families_count_the_cells_that_trained_in_each_seed():
    arms = [Arm(f"bn_{lr}", "bn", ()) for lr in (1, 2, 3)]
    table = {
        "bn_1": {"test_error": [0.05, 0.05]},
        "bn_2": {"test_error": [0.10, 0.5]},
        "bn_3": {"test_error": [0.9, None]},
    }
    assert measurements.families(arms, table, 0.10, ERROR) == {
        "bn": {"cells_trained": [2.0, 1.0], "cells": [3.0, 3.0]}
    }


@pytest.mark.parametrize(
    ("norm", "together"),
    [
        ("local", 2),
        ("sync", 16),
        ("big_batch", 16),
        ("sync_group", 8),
        ("ghost", 2),
        ("none", None),
    ],
)
def test_how_many_samples_share_their_statistics(norm, together):
    run = RunConfig(
        norm=NormConfig(norm, group_size=4),
        train=TrainConfig(per_rank_batch=2),
        launcher=LauncherConfig(num_workers=8),
    )
    assert measurements.normalisation_batch(run) == together
