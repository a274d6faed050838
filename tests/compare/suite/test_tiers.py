"""The studies of a tier: which run, in which order and with which settings; what is kept of each."""

import json

import pytest

from syncbn.compare.report.words.numbers import time_words
from syncbn.compare.suite import ledger
from syncbn.compare.suite.ledger import Ledger, entry
from syncbn.compare.suite.tiers import Launch, declared, studies_of
from syncbn.compose import compose, config_folder
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
    return declared(tmp_path)


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
        declared(tmp_path)


def test_every_study_of_the_project_composes_in_both_tiers():
    studies = declared(config_folder() / "study")
    for tier in ("fast", "full"):
        if any(tier in study.tiers for study in studies.values()):
            for launch in studies_of(tier, studies):
                assert compose(launch.overrides).name == launch.name


def test_the_worst_failure_is_a_bug_and_the_least_one_that_may_go_away():
    assert worst([0, 3, 75, 1, 8]) == 1
    assert worst([0, 75, 3]) == 3
    assert worst([0, 0]) == 0
    assert failure_words({"a": 3, "b": 0}) == "1 of 2 studies failed: a (data)"


def kept(name="a", code=0, order=1, budget=0.0, verdicts=("REPRODUCED",)):
    claims = [{"name": f"c{i}", "verdict": verdict} for i, verdict in enumerate(verdicts)]
    launch = Launch(name, name, f"What of {name}?", (), order, budget)
    return entry(launch, "done" if code == 0 else "data", code, "", {"claims": claims})


def test_the_ledger_is_kept_from_launch_to_launch_in_the_order_of_studies(tmp_path):
    Ledger(tmp_path).note(kept("b", order=2), 10, trained=True)
    book = Ledger(tmp_path)
    book.note(kept("a", order=1), 5, trained=True)
    assert list(ledger.read(tmp_path)) == ["a", "b"]
    assert json.loads((tmp_path / "studies.json").read_text())["seconds"] == 15
    assert (tmp_path / "studies.md").read_text().count("| done |") == 2


def test_time_adds_up_over_interruptions_and_a_launch_without_training_takes_none(tmp_path):
    book = Ledger(tmp_path)
    for code, seconds, trained, total in [
        (143, 100, True, 100),  # stopped on the way
        (0, 50, True, 150),  # finished
        (0, 8, False, 150),  # nothing left to train
        (0, 70, True, 70),  # run anew
    ]:
        book.note(kept(code=code), seconds, trained)
        assert book.entries["a"]["seconds"] == total


def test_the_table_counts_verdicts_and_says_what_took_longer_than_declared():
    entries = [kept(verdicts=("REPRODUCED", "INCONCLUSIVE"), budget=60), kept("b", code=3)]
    entries[0]["seconds"] = 300.0
    text = ledger.text(entries)
    assert "5 min of 60 s" in text
    assert "1 of 2 studies done; claims: 2 reproduced, 0 not reproduced, 1 inconclusive" in text


def test_half_a_ledger_is_none(tmp_path):
    (tmp_path / "studies.json").write_text('{"studies": [')
    assert ledger.read(tmp_path) == {}


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.4, "8 s"), (720, "12 min"), (11_100, "3 h 05 min")]
)
def test_durations_read_as_people_say_them(seconds, words):
    assert time_words(seconds) == words
