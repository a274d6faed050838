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


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 7, 8])
def test_a_mistake_is_not_made_again(tmp_path, code):
    is_first_to_fail(environ(tmp_path, 0), code, "no data")
    refuse_mistake_again(environ(tmp_path, 0))
    for attempt in (1, 2):
        with pytest.raises(RankFailed, match="no data") as raised:
            refuse_mistake_again(environ(tmp_path, attempt))
        assert str(raised.value) == f"no data{AGAIN}"
        assert raised.value.exit_code == code
        is_first_to_fail(environ(tmp_path, attempt), code, str(raised.value))


@pytest.mark.parametrize("code", [6, 75, 130, 143])
def test_what_may_have_passed_is_tried_again(tmp_path, code):
    is_first_to_fail(environ(tmp_path, 0), code, "another rank exited")
    refuse_mistake_again(environ(tmp_path, 1))


def test_a_rank_that_was_killed_left_nothing_and_is_tried_again(tmp_path):
    refuse_mistake_again(environ(tmp_path, 1))
    refuse_mistake_again({})
