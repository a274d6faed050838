"""A finished study's summary: what is refused as one, and how it is asked for values."""

import json
import math

import numpy as np
import pytest

from syncbn.compare.study.summary import among, by_seed, contrast, finite, median_of, read_summary
from syncbn.errors import UsageError

SHORT = {
    "study": "demo",
    "design": {"seeds": [0, 1, 2, 3, 4, 5]},
    "arms": {"local": {"test_error": [0.3, 0.3, 0.3]}},
    "claims": [],
}
"""A summary whose arm has fewer values than the study has seeds."""


def summary(claims=(), **arms) -> dict:
    """A study of two seeds, arm to its test errors."""
    table = {arm: {"test_error": values} for arm, values in arms.items()}
    return {"study": "demo", "design": {"seeds": [4, 2]}, "arms": table, "claims": list(claims)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "summary.json is missing"),
        ("{", "cannot be read as JSON"),
        ('{"final": {}, "steps": 3}', "no study's summary: 'study' is missing"),
        (json.dumps(SHORT), "'test_error' of arm 'local'"),
    ],
)
def test_a_folder_that_holds_no_study_is_refused(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UsageError, match=complaint):
        read_summary(tmp_path)


def test_a_summary_that_was_written_is_read_back(tmp_path):
    written = summary(local=[0.4, None])
    (tmp_path / "summary.json").write_text(json.dumps(written))
    assert read_summary(tmp_path) == written


def test_values_belong_to_their_seeds_and_a_median_needs_all_of_them():
    found = summary(local=[0.4, None], sync=[0.1, 0.3])
    assert by_seed(found, "local", "test_error") == {4: 0.4, 2: None}
    assert by_seed(found, "local", "step_ms") == {}
    assert median_of(found, "sync", "test_error") == 0.2
    assert median_of(found, "local", "test_error") is None


def test_a_title_contrasts_the_arms_of_the_first_claim_on_its_metric():
    errors = {"arm": "sync", "against": "local", "metric": "test_error"}
    times = {"arm": "group", "against": "sync", "metric": "step_ms"}
    found = summary([times, errors], local=[0.4, 0.4], sync=[0.1, 0.3], group=[0.2, 0.2])
    assert contrast(found, "test_error") == ("local", "sync")
    assert contrast(found) == ("sync", "group")
    assert contrast(summary(local=[0.4, 0.4], sync=[0.1, 0.3])) == ("local", "sync")
    assert among(("local", "gone"), ["local", "sync", "group"]) == ["local", "group"]


def test_what_json_has_no_number_for_is_none_at_any_depth():
    tree = {"a": [1.0, math.inf, {"b": math.nan}], "c": np.float64("-inf"), "d": "inf", "e": 2}
    assert finite(tree) == {"a": [1.0, None, {"b": None}], "c": None, "d": "inf", "e": 2}
