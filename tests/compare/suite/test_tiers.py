"""The studies of a tier: which run, in which order and with which settings; what is kept of each."""

import pytest

from syncbn.compare.suite.tiers import declared, studies_of
from syncbn.compose import compose, config_files
from syncbn.errors import UsageError
from syncbn.launch.studies import failure_words, worst

STUDIES = {
    "late": "study: {question: 'Q1?', order: 9, tiers: [full], budget_s: 60}",
    "early": "study: {order: 1, tiers: [fast, full], fast: [train.steps=5, 'study.seeds=[0,1]']}",
    "middle": "{name: other, study: {order: 5, tiers: [full]}}",
    "mine": "study: {question: mine}",
}


@pytest.fixture
def known(tmp_path):
    for name, text in STUDIES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return declared(sorted(tmp_path.iterdir()))


def test_a_tier_has_its_studies_in_their_order(known):
    assert [launch.study for launch in studies_of("full", known)] == ["early", "middle", "late"]
    assert [launch.study for launch in studies_of("fast", known)] == ["early"]


def test_the_full_tier_runs_a_study_as_it_stands(known):
    late = studies_of("full", known)[-1]
    assert (late.name, late.overrides) == ("late", ("study=late",))
    assert (late.question, late.budget_s) == ("Q1?", 60)
    assert studies_of("full", known)[1].name == "other"  # as its file calls it


def test_the_fast_tier_runs_its_overrides_in_a_folder_of_its_own(known):
    fast = studies_of("fast", known)[0]
    assert fast.name == "early-fast"
    assert fast.overrides == (
        "study=early", "name=early-fast", "study.tier=fast", "train.steps=5", "study.seeds=[0,1]"
    )  # fmt: skip


def test_names_choose_studies_of_any_tier_still_in_order(known):
    chosen = studies_of("full", known, ["mine", "late", "early"])
    assert [launch.study for launch in chosen] == ["early", "late", "mine"]


def test_an_unknown_name_is_refused_with_those_that_are_known(known):
    with pytest.raises(UsageError, match="'nope' is not in conf/study/: early, late"):
        studies_of("full", known, ["nope"])


def test_a_study_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("study: [")
    with pytest.raises(UsageError, match=r"bad\.yaml cannot be read"):
        declared([tmp_path / "bad.yaml"])


def test_a_study_file_that_is_no_mapping_is_named(tmp_path):
    (tmp_path / "list.yaml").write_text("[study]")
    with pytest.raises(UsageError, match=r"list\.yaml is no study"):
        declared([tmp_path / "list.yaml"])


def test_every_study_of_the_project_composes_in_both_tiers():
    studies = declared(config_files("study").values())
    for tier in ("fast", "full"):
        if any(tier in study.tiers for study in studies.values()):
            for launch in studies_of(tier, studies):
                assert compose(launch.overrides).name == launch.name


def test_of_several_failures_a_bug_is_the_worst_and_a_temporary_one_the_least():
    assert worst([0, 3, 75, 1, 8]) == 1
    assert worst([0, 75, 3]) == 3
    assert worst([0, 0]) == 0
    assert failure_words({"a": 3, "b": 0}) == "1 of 2 studies failed: a (data)"
