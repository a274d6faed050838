"""What a study runs: arms, cells, trials and waves, and the search before them."""

import json
from pathlib import Path

import pytest

from syncbn.compare.study.design import Trial, arms_of, most_processes, num_trials, trials, waves
from syncbn.compare.study.preflight import refuse_unfit
from syncbn.compare.study.tuning import chosen, followed, search, tuned_values
from syncbn.compose import compose
from syncbn.config import (
    ClaimConfig,
    Config,
    LauncherConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
    TuneConfig,
)
from syncbn.errors import UsageError


def _study(folder: Path, **study) -> Config:
    arms = {"none": ["norm=none"], "bn": ["norm=local"]}
    settings = {"seeds": [0, 1], "arms": arms} | study
    return Config(
        name="s",
        runs_dir=str(folder),
        train=TrainConfig(steps=100, per_rank_batch=8),
        launcher=LauncherConfig(num_workers=2),
        study=StudyConfig(**settings),
    )


def _trials(*num_ranks: int) -> list[Trial]:
    return [
        Trial(f"a{i}", 0, RunConfig(launcher=LauncherConfig(num_workers=n)))
        for i, n in enumerate(num_ranks)
    ]


def test_a_grid_makes_an_arm_of_every_combination(tmp_path):
    cfg = _study(tmp_path, grid={"optim.lr": [0.1, 1.0], "model.init_std": [0.05, 5.0]})
    names = [arm.name for arm in arms_of(cfg.study)]
    assert names[:4] == ["none_0.1_0.05", "none_0.1_5", "none_1_0.05", "none_1_5"]
    assert len(names) == 8
    assert num_trials(cfg.study) == 16
    last = trials(cfg)[-1]
    assert (last.name, last.config.optim.lr, last.config.model.init_std) == ("bn_1_5-1", 1.0, 5.0)


def test_waves_take_just_as_many_processes_as_a_trial_has_ranks():
    mixed = _trials(4, 1, 2, 1)
    found = waves(mixed, None)
    assert [(size, [t.arm for t in wave]) for size, wave in found] == [
        (2, ["a2", "a1", "a3"]),
        (4, ["a0"]),
    ]


def test_trials_of_one_process_share_a_pool_no_larger_than_their_number():
    assert [(n, len(wave)) for n, wave in waves(_trials(1, 1, 1), 2)] == [(2, 3)]
    assert [(n, len(wave)) for n, wave in waves(_trials(1), 8)] == [(1, 1)]
    assert waves([], 2) == []


def test_virtual_ranks_take_one_process(tmp_path):
    cfg = compose(["study=batch_size", f"runs_dir={tmp_path}", "launcher.processes=2"])
    assert most_processes(cfg) == 2
    assert {trial.config.num_ranks for trial in trials(cfg)} == {1}


def _tuned(folder: Path, **tune) -> Config:
    return _study(folder, tune=TuneConfig(values=[0.01, 0.1, 1.0], seeds=[7, 8], **tune))


def _leave(cfg: Config, errors: dict[str, dict[float, float]]) -> None:
    """Finish the search with the same error for all its seeds."""
    for trial in search(cfg):
        arm, _, value = trial.arm.rpartition("_")
        folder = trial.config.folder
        folder.mkdir(parents=True)
        final = {"test_error": errors[arm][float(value)]}
        (folder / "summary.json").write_text(json.dumps({"final": final}))


ERRORS = {"none": {0.01: 0.2, 0.1: 0.1, 1.0: 0.9}, "bn": {0.01: 0.2, 0.1: 0.05, 1.0: 0.05}}


def test_the_search_gives_every_arm_the_same_values_seeds_and_held_out_samples(tmp_path):
    cfg = _tuned(tmp_path, validation=0.2, steps=50)
    found = search(cfg)
    assert len(found) == 2 * 3 * 2
    per_arm = {
        arm: {(t.config.optim.lr, t.seed) for t in found if t.arm.startswith(arm)}
        for arm in ("none", "bn")
    }
    assert per_arm["none"] == per_arm["bn"]
    assert {t.config.data.validation for t in found} == {0.2}
    assert {t.config.train.steps for t in found} == {50}
    assert not {t.seed for t in found} & set(cfg.study.seeds)


def test_the_search_chooses_the_smallest_error_and_the_smaller_of_equal_values(tmp_path):
    cfg = _tuned(tmp_path)
    _leave(cfg, ERRORS)
    choices = chosen(cfg)
    assert tuned_values(choices) == {"none": 0.1, "bn": 0.1}
    assert not choices["bn"].at_an_end
    assert {t.config.optim.lr for t in trials(cfg, tuned_values(choices))} == {0.1}
    assert {t.config.data.validation for t in trials(cfg, tuned_values(choices))} == {0.0}


def test_an_arm_may_follow_another_and_a_choice_at_an_end_says_so(tmp_path):
    cfg = _tuned(tmp_path, follow={"bn": "none*5"})
    _leave(cfg, ERRORS | {"none": {0.01: 0.05, 0.1: 0.1, 1.0: 0.9}})
    choices = chosen(cfg)
    assert tuned_values(choices) == {"none": 0.01, "bn": pytest.approx(0.05)}
    assert choices["none"].at_an_end
    assert followed("none") == ("none", 1.0)


def test_an_unfinished_trial_of_the_search_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"trial none_0\.01-7 of the search"):
        chosen(_tuned(tmp_path))


@pytest.mark.parametrize(
    ("study", "complaint"),
    [
        ({"arms": {"none": ["norm=none"], "bn": ["norm=local", "optim.lr=0.1"]}},
         "arm 'bn' sets optim.lr, which study.tune searches for in every arm alike"),
        ({"seeds": [0, 7]}, "overlap"),
    ],
)  # fmt: skip
def test_a_search_that_is_not_the_same_for_all_is_refused(tmp_path, study, complaint):
    tune = TuneConfig(values=[0.01, 0.1], seeds=[7, 8])
    with pytest.raises(UsageError, match=complaint):
        refuse_unfit(*_with_study(_study(tmp_path, tune=tune, **study)))


@pytest.mark.parametrize("follow", [{"bn": "gone*2"}, {"gone": "none*2"}, {"bn": "none*much"}])
def test_a_rule_to_follow_names_an_arm_that_is_searched_for(tmp_path, follow):
    tune = TuneConfig(values=[0.01, 0.1], seeds=[7], follow=follow)
    with pytest.raises(UsageError, match=r"study\.tune\.follow"):
        refuse_unfit(*_with_study(_study(tmp_path, tune=tune)))


def test_arms_of_a_claim_may_differ_in_its_own_factor_alone(tmp_path):
    arms = {"none": ["norm=none"], "bn": ["norm=local", "optim.momentum=0.5"]}
    claims = [ClaimConfig("c", "bn", "none", factor=["norm"])]
    cfg = _study(tmp_path, arms=arms, factor=["norm", "optim.momentum"], claims=claims)
    with pytest.raises(UsageError, match=r"optim\.momentum .* of claim 'c'"):
        refuse_unfit(*_with_study(cfg))


def _with_study(cfg: Config) -> tuple[Config, StudyConfig]:
    assert cfg.study is not None
    return cfg, cfg.study
