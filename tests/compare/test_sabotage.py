"""Ways to get a better result than the runs gave, each of which is refused or changes nothing.

Swapped arms, test samples in training, dropped pairing, averaged censored runs, a search for one arm only.
"""

import json
from pathlib import Path

import pytest
import torch
from trial_files import demo_error, make_study, study_config, without_figures

from syncbn.checks import check
from syncbn.compare.results import write_results
from syncbn.compare.study.preflight import refuse_unfit
from syncbn.compare.study.tuning import search
from syncbn.config import ClaimConfig, Config, DataConfig, TargetConfig, TuneConfig
from syncbn.data import load_data
from syncbn.errors import UsageError

pytestmark = pytest.mark.usefixtures("numbers_alone")
numbers_alone = pytest.fixture(without_figures)
CLAIM = ClaimConfig("sync_beats_local", "sync", "local", threshold=-0.2)


def small(tmp_path: Path, **settings) -> Config:
    settings = {"arms": ("local", "sync"), "steps": 200, "claims": (CLAIM,)} | settings
    cfg = study_config(tmp_path, **settings)
    make_study(cfg, demo_error)
    return cfg


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_arms_whose_folders_were_swapped_are_refused(tmp_path):
    cfg = small(tmp_path)
    folder = cfg.folder / "trials"
    for seed in cfg.study.seeds:
        swap(folder / f"local-{seed}", folder / f"sync-{seed}")
    with pytest.raises(
        UsageError, match=r"local-0 did not run what the study declares .*norm\.name"
    ):
        write_results(cfg)
    assert not (cfg.folder / "summary.json").exists()


def test_seeds_whose_folders_were_swapped_are_refused(tmp_path):
    cfg = small(tmp_path)
    folder = cfg.folder / "trials"
    swap(folder / "sync-0", folder / "sync-1")
    with pytest.raises(UsageError, match=r"saw other samples|seed"):
        write_results(cfg)


def test_trials_that_saw_other_samples_are_no_pair(tmp_path):
    cfg = small(tmp_path)
    journal = cfg.folder / "trials" / "sync-2" / "journal.jsonl"
    journal.write_text(journal.read_text().replace("samples of seed 2", "samples of my choice"))
    with pytest.raises(UsageError, match="local-2 and sync-2 have one seed but saw other samples"):
        write_results(cfg)


def test_the_interval_is_that_of_pairs_and_pairs_are_those_of_a_seed(tmp_path):
    def far_apart(arm: str, seed: int, step: int) -> float:
        """Seeds differ by far more than arms do."""
        return 0.1 + 0.1 * seed + (0.01 if arm == "local" else 0.0) + 0.001 * (seed % 2)

    claim = ClaimConfig("c", "sync", "local", threshold=0.0)
    cfg = study_config(tmp_path, arms=("local", "sync"), steps=200, claims=(claim,))
    make_study(cfg, far_apart)
    found = write_results(cfg)["claims"][0]
    assert found["verdict"] == "REPRODUCED"  # without pairing the interval would be 0.4 wide
    assert found["ci"] == pytest.approx([-0.01, -0.01])
    assert found["pairs"] == pytest.approx([-0.01] * 6)


def test_a_censored_run_is_counted_and_never_averaged(tmp_path):
    def slow_at_times(arm: str, seed: int, step: int) -> float:
        late = arm == "local" and seed >= 2
        return 0.5 if step < 100 or late else 0.05

    claim = ClaimConfig(
        "faster", "sync", "local", metric="steps_to_target", scale="ratio", threshold=0.9
    )
    cfg = study_config(tmp_path, arms=("local", "sync"), steps=200, claims=(claim,))
    cfg.study.target = TargetConfig(error=0.1)
    make_study(cfg, slow_at_times)
    summary = write_results(cfg)
    assert summary["arms"]["local"]["steps_to_target"] == [100, 100, None, None, None, None]
    found = summary["claims"][0]
    assert (found["verdict"], found["effect"]) == ("INCONCLUSIVE", None)
    assert "4 of 6 pairs are censored" in found["note"]


def test_a_search_for_one_arm_only_is_refused(tmp_path):
    cfg = study_config(tmp_path, arms=("local", "sync"))
    cfg.study.tune = TuneConfig(values=[0.01, 0.1])
    cfg.study.arms["local"] = ["norm=local", "optim.lr=0.05"]
    with pytest.raises(UsageError, match=r"'local' sets optim\.lr, which study.tune searches for"):
        refuse_unfit(cfg, cfg.study)


def test_a_search_on_the_test_set_is_refused(tmp_path):
    cfg = study_config(tmp_path)
    cfg.study.tune = TuneConfig(values=[0.01, 0.1], validation=0.0)
    with pytest.raises(UsageError, match="must not see the test set"):
        check(cfg)


def test_a_search_measures_what_neither_its_training_nor_the_study_tests_on(tmp_path):
    cfg = study_config(tmp_path)
    cfg.study.tune = TuneConfig(values=[0.01, 0.1], validation=0.2)
    searched = load_data(search(cfg)[0].config.data, 0)
    tested = images(load_data(cfg.data, 0).test)
    assert not images(searched.test) & tested
    assert not images(searched.test) & images(searched.train)


@pytest.mark.parametrize("data", [DataConfig(), DataConfig(limit=300), DataConfig(validation=0.1)])
def test_no_sample_is_both_trained_and_tested_on(data):
    sets = load_data(data, 0)
    assert len(images(sets.train)) == len(sets.train)
    assert not images(sets.train) & images(sets.test)


def images(split) -> set[bytes]:
    """The content of each image of a split."""
    whole = next(iter(split.batches([torch.arange(len(split))])))[0]
    return {image.numpy().tobytes() for image in whole}


def test_a_summary_made_again_from_the_same_files_is_the_same(tmp_path):
    cfg = small(tmp_path)
    write_results(cfg)
    first = (cfg.folder / "summary.json").read_bytes()
    write_results(cfg)
    assert (cfg.folder / "summary.json").read_bytes() == first
    assert json.loads(first)["claims"][0]["verdict"] == "REPRODUCED"
