"""Ranks that torchrun starts again: a mistake is told again at once, and what may have passed is tried."""

import pytest

from syncbn.cli.torchrun import AGAIN, is_first_to_fail, refuse_mistake_again
from syncbn.errors import RankFailed


def environ(folder, attempt, rank=0):
    path = folder / f"attempt_{attempt}" / str(rank) / "error.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"TORCHELASTIC_ERROR_FILE": str(path)}


def test_the_first_to_fail_speaks_in_each_attempt(tmp_path):
    assert is_first_to_fail(environ(tmp_path, 0, rank=1), 3, "no data")
    assert not is_first_to_fail(environ(tmp_path, 0, rank=0), 75, "another rank exited")
    assert is_first_to_fail(environ(tmp_path, 1), 3, "no data")
    assert is_first_to_fail({}, 3, "no data"), "without torchrun there is nobody else"


def refused(environ):
    """What a rank that torchrun starts is refused with; None where it may try."""
    try:
        refuse_mistake_again(environ)
    except RankFailed as failure:
        return failure.exit_code, str(failure)
    return None


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 7, 8])
def test_a_mistake_is_not_made_again(tmp_path, code):
    is_first_to_fail(environ(tmp_path, 0), code, "no data")
    assert refused(environ(tmp_path, 0)) is None
    for attempt in (1, 2):
        assert refused(environ(tmp_path, attempt)) == (code, f"no data{AGAIN}")
        is_first_to_fail(environ(tmp_path, attempt), code, f"no data{AGAIN}")


@pytest.mark.parametrize("code", [6, 75, 130, 143])
def test_what_may_have_passed_is_tried_again(tmp_path, code):
    is_first_to_fail(environ(tmp_path, 0), code, "another rank exited")
    assert refused(environ(tmp_path, 1)) is None


def test_a_rank_that_was_killed_left_nothing_and_is_tried_again(tmp_path):
    assert refused(environ(tmp_path, 1)) is None
    assert refused({}) is None
