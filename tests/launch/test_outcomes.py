"""Whose outcome is heard when some of several ranks fail."""

import signal

import pytest

from syncbn.errors import DataError, RankFailed, Stopped
from syncbn.launch.children import after_signal, failure, reports_in, told
from syncbn.launch.outcomes import was_stopped


def reports(*codes):
    """What ranks told that ended with `codes`, in this order of time; None told nothing."""
    return {
        rank: {
            "message": {"message": f"rank {rank}: {code}", "extraInfo": {"py_callstack": "trace"}},
            "exit_code": code,
            "time": rank,
        }
        for rank, code in enumerate(codes)
        if code is not None
    }


@pytest.mark.parametrize(
    ("codes", "exit_code", "message"),
    [
        ((75, 3), 3, "rank 1: 3"),
        ((1, 3), 3, "rank 1: 3"),
        ((75, 1), 1, "rank 1: 1"),
        ((5, 1), 1, "rank 1: 1"),
        ((5, 5), 5, "rank 0: 5"),
        ((143, 4), 4, "rank 1: 4"),
        ((143, 143), 143, "rank 0: 143"),
        ((0, 8), 8, "rank 1: 8"),
        ((75, None), 75, "rank 1 died: start it again to continue from its checkpoint"),
        ((143, None), 75, "rank 1 died: start it again to continue from its checkpoint"),
        ((None, None), 75, "rank 0, 1 died: start it again to continue from its checkpoint"),
        ((3, None), 3, "rank 0: 3"),
    ],
)
def test_the_rank_that_knows_best_is_heard(codes, exit_code, message):
    heard = failure(reports(*codes), len(codes))
    assert (heard.exit_code, str(heard)) == (exit_code, message)


@pytest.mark.parametrize(
    ("codes", "exit_code", "message"),
    [
        ((143, 143), 143, "stopped by signal 15, checkpoint saved"),
        ((0, 0), 143, "stopped by signal 15, checkpoint saved"),
        ((None, None), 143, "stopped by signal 15 before a checkpoint could be saved"),
        ((75, 143), 143, "stopped by signal 15 before a checkpoint could be saved"),
        ((4, 75), 4, "rank 0: 4"),
    ],
)
def test_a_checkpoint_is_said_to_be_saved_where_rank_0_says_so(codes, exit_code, message):
    told = reports(*codes)
    for report in told.values():
        if report["exit_code"] == 143:
            report["message"]["message"] = str(Stopped(15))
    ended = after_signal(15, told, len(codes))
    assert (ended.exit_code, str(ended)) == (exit_code, message)


def test_a_rank_that_was_stopped_before_a_checkpoint_is_heard_too():
    told = reports(143, 143)
    told[0]["message"]["message"] = str(Stopped(15, saved=False))
    assert str(after_signal(15, told, 2)).endswith("before a checkpoint could be saved")


def test_a_rank_tells_how_it_ended_good_or_bad(tmp_path, monkeypatch):
    for rank, error in enumerate((None, DataError("no data"), KeyError("x"))):
        file = tmp_path / "run_1" / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        if error is None:
            with told():
                pass
        else:
            with pytest.raises(SystemExit), told():
                raise error
    found = reports_in(tmp_path)
    assert {rank: report["exit_code"] for rank, report in found.items()} == {0: 0, 1: 3, 2: 1}
    heard = failure(found, 3)
    assert str(heard) == "no data"
    assert "DataError" in heard.details


def test_a_signal_between_a_failure_and_its_report_does_not_silence_the_rank(tmp_path, monkeypatch):
    file = tmp_path / "run_1" / "attempt_0" / "0" / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit), told():
        fail_and_be_signalled()
    assert str(failure(reports_in(tmp_path), 1)) == "no data"


def fail_and_be_signalled():
    try:
        raise DataError("no data")
    finally:
        signal.raise_signal(signal.SIGTERM)


def test_a_stop_is_known_wherever_it_comes_from():
    stops = (Stopped(2), KeyboardInterrupt(), RankFailed("stopped by signal 15", 143))
    assert all(map(was_stopped, stops))
    assert not any(map(was_stopped, (KeyError("x"), RankFailed("gone", 75))))
