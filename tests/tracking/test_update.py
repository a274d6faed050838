"""What journal records say, and what of it must not be said."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.tracking.redact import redact, redact_text
from syncbn.tracking.update import MAX_VALUE, Point, flatten, fold, shorten

START = {
    "event": "start",
    "time": 100.0,
    "config": {"seed": 3, "optim": {"lr": 0.1}},
    "config_hash": "abc",
    "git": "0123abc",
    "attempt": 2,
    "world_size": 4,
    "versions": {"torch": "2.15.0"},
}


def test_a_start_gives_params_tags_and_a_running_run():
    update = fold([START])
    assert update.params == {"seed": "3", "optim.lr": "0.1"}
    assert update.tags.items() >= {
        "seed": "3", "config_hash": "abc", "git": "0123abc", "attempt": "2",
        "world_size": "4", "version.torch": "2.15.0",
    }.items()  # fmt: skip
    assert update.status == "RUNNING"


def test_points_keep_the_journals_step_and_time():
    update = fold([{"step": 40, "metrics": {"train_loss": 0.5}, "time": 12.345}])
    assert update.points == [Point("train_loss", 0.5, 40, 12345)]


def test_words_for_non_finite_numbers_become_numbers():
    (point,) = fold([{"step": 1, "metrics": {"loss": "nan"}, "time": 1.0}]).points
    assert math.isnan(point.value)


def test_the_last_word_on_the_status_counts():
    end = {"event": "end", "status": "stopped", "error": None, "time": 200.0}
    assert fold([START, end]).status == "KILLED"
    assert fold([START, end, START | {"time": 300.0}]).status == "RUNNING"
    assert fold([end | {"status": "finished"}]).time_ms == 200_000


def test_a_failed_run_says_of_what():
    update = fold([{"event": "end", "status": "failed", "error": "NonFinite: loss", "time": 1.0}])
    assert (update.status, update.tags["error"]) == ("FAILED", "NonFinite: loss")


def test_a_run_that_went_on_by_itself_says_how_often_and_after_what():
    ended = {"event": "end", "status": "failed", "error": "RankFailed: rank 1 died", "time": 1.0}
    again = {"event": "restart", "number": 2, "reason": "rank 1 died", "from_step": 4, "time": 2.0}
    start = {"event": "start", "config": {}, "attempt": 3, "time": 3.0}
    tags = fold([ended, again, start]).tags
    assert (tags["restarts"], tags["restarted_after"], tags["error"]) == ("2", "rank 1 died", "")
    assert fold([ended]).tags["error"] == "RankFailed: rank 1 died"
    assert fold([again, start, ended]).tags["error"] == "RankFailed: rank 1 died"


def test_the_end_says_how_long_the_run_took():
    end = {
        "event": "end",
        "status": "finished",
        "summary": {"seconds": 2.5, "steps": 60},
        "time": 1.0,
    }
    assert fold([end]).points == [Point("seconds", 2.5, 60, 1000)]


def test_secrets_in_a_config_do_not_become_params():
    config = {
        "tracking": {"uri": "https://login0:pw@host:5000/x?api_token=abc&y=1", "token": "t0p"},
        "aws_secret_access_key": "AKIA",
        "list": ["http://u:p@h/"],
    }
    said = str(fold([START | {"config": config}]))
    for secret in ("login0", "pw@", "abc&", "t0p", "AKIA", "u:p"):
        assert secret not in said
    assert "https://***@host:5000/x?api_token=***&y=1" in said


def test_redaction_keeps_words_that_are_no_secret():
    tree = {"optim": {"lr": 0.1, "momentum": 0.9}, "arms": ["a", "b"], "uri": None, "keys": 3}
    assert redact(tree) == tree


@given(st.text(alphabet=st.characters(exclude_categories=["Z", "C"]), min_size=1))
def test_user_info_never_survives(password):
    assert redact({"a": [f"x://u:{password}@host/p"]}) == {"a": ["x://***@host/p"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("at http://u:p@ss/w@h:5, and a@b", "at http://***@h:5, and a@b"),
        ("uri='http://u:two words@h'", "uri='http://***@h'"),
        ("launcher.address='u:p@ss@h:6379'", "launcher.address='***@h:6379'"),
        ("http://h:5/x, said a@b", "http://h:5/x, said a@b"),
        ("sqlite:////tmp/a@b.db and h:6379", "sqlite:////tmp/a@b.db and h:6379"),
    ],
)
def test_passwords_in_addresses_are_redacted_whatever_they_hold(text, said):
    assert redact_text(text) == said


@given(st.text(max_size=10_000))
def test_long_values_are_cut_with_a_note(text):
    short = shorten(text)
    assert len(short) <= MAX_VALUE
    assert short == text or f"{len(text)} characters" in short


def test_nested_keys_are_joined_by_dots():
    tree = {"a": {"b": {"c": 1}}, "d": [1, 2], "e": None}
    assert flatten(tree) == {"a.b.c": "1", "d": "[1, 2]", "e": "None"}
