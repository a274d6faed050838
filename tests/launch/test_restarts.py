"""Which failures a launch heals by itself, how often, and what the journal says of the attempts."""

import errno
import os
import threading
from dataclasses import replace

import pytest

from syncbn.checkpoint import FolderInUse, RunLock
from syncbn.compare.study.design import Trial
from syncbn.compare.study.failure import note_failure
from syncbn.compose import compose
from syncbn.errors import (
    CheckpointError,
    DataError,
    InfrastructureError,
    NonFinite,
    NotAuthorised,
    OutOfTime,
    RankFailed,
    ServiceUnreachable,
    Stopped,
    UsageError,
)
from syncbn.launch import restarts as module
from syncbn.launch.children import _report_of, failure
from syncbn.launch.restarts import Restarts, healed, healed_waves, heals
from syncbn.norm import RanksDisagree
from syncbn.tracking import Journal, read_journal

DEAD = InfrastructureError("rank 1 died: start it again to continue from its checkpoint")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def tiny():
    return compose(["debug=tiny", "name=run"])


@pytest.fixture
def cfg(tiny, tmp_path):
    return replace(tiny, runs_dir=str(tmp_path))


def failing(*errors):
    """An attempt that ends with each of `errors` in turn, and then well, with what it was given."""
    left = list(errors)
    given = []

    def attempt(runs):
        given.append(runs)
        if left:
            raise left.pop(0)
        return "done"

    attempt.given = given
    return attempt


def begun(cfg, saved=0):
    """The journal of a rank 0 that was killed, after a checkpoint where it `saved` one."""
    journal = Journal(cfg.folder / "journal.jsonl")
    journal.begin(0)
    journal.metrics(saved + 3, {"train_loss": 1.0})
    if saved:
        journal.event("checkpoint", step=saved, folder=f"step-{saved:06d}")
        (cfg.folder / "checkpoints").mkdir()
        (cfg.folder / "checkpoints" / "LATEST").write_text(f"step-{saved:06d}\n")
    journal.close()
    with journal.path.open("a") as file:
        file.write('{"step": 9, "metr')


def events(cfg):
    records = read_journal(cfg.folder / "journal.jsonl")
    return [record for record in records if record.get("event") not in (None, "checkpoint")]


def test_what_died_is_tried_again_and_the_outcome_is_that_of_the_last_attempt(cfg, capsys):
    attempt = failing(DEAD, DEAD)
    assert healed(attempt, [cfg], Restarts(3)) == "done"
    assert len(attempt.given) == 3
    assert capsys.readouterr().err.splitlines() == [
        "syncbn: rank 1 died: restart 1 of 3, beginning anew",
        "syncbn: rank 1 died: restart 2 of 3, beginning anew",
    ]


def test_after_the_last_restart_the_failure_is_what_it_is(cfg):
    attempt = failing(*[DEAD] * 9)
    with pytest.raises(InfrastructureError, match="rank 1 died: start it again"):
        healed(attempt, [cfg], Restarts(2))
    assert len(attempt.given) == 3


def test_the_pause_grows_only_while_attempts_save_nothing(cfg, monkeypatch):
    pauses = []
    monkeypatch.setattr(module, "PAUSE_S", 0.5)
    monkeypatch.setattr(module, "_pause", lambda seconds, saved: pauses.append((seconds, saved)))
    (cfg.folder / "checkpoints").mkdir(parents=True)
    saved = iter([None, None, 40, 80, 80])

    def attempt(_):
        step = next(saved, "done")
        if step == "done":
            return step
        if step is not None:
            (cfg.folder / "checkpoints" / "LATEST").write_text(f"step-{step:06d}\n")
        raise DEAD

    assert healed(attempt, [cfg], Restarts(9)) == "done"
    assert pauses == [(0.5, False), (1.0, False), (0.5, True), (0.5, True), (1.0, True)]


def test_so_many_restarts_are_left_in_any_hour():
    now = [0.0]
    restarts = Restarts(2, clock=lambda: now[0])
    numbers = []
    for minute in (0, 30, 59, 60, 61, 90):
        now[0] = 60.0 * minute
        numbers.append(restarts.next())
    assert numbers == [1, 2, None, 2, None, 2]
    assert Restarts(0).next() is None


@pytest.mark.parametrize(
    "error",
    [KeyError("a bug"), UsageError("x"), DataError("x"), CheckpointError("x"), RanksDisagree("x"),
     ServiceUnreachable("x"), NotAuthorised("x"), NonFinite("x"), OutOfTime("x"), Stopped(15),
     KeyboardInterrupt(), RankFailed("no data", 3), RankFailed("over", 75, kind="OutOfTime")],
    ids=repr,
)  # fmt: skip
def test_what_a_person_must_mend_or_has_asked_for_is_not_tried_again(cfg, error):
    attempt = failing(error)
    with pytest.raises(type(error)):
        healed(attempt, [cfg], Restarts(3))
    assert len(attempt.given) == 1


def test_a_time_limit_is_known_as_such_when_ranks_report_it():
    over = failure({0: _report_of(OutOfTime("it was over"))}, 1)
    assert (over.exit_code, heals(over)) == (75, False)
    assert heals(failure({0: _report_of(OSError(errno.ENOSPC, "full"))}, 1))


def test_a_restart_goes_on_from_the_newest_checkpoint(cfg, capsys):
    begun(cfg, saved=40)
    assert healed(failing(DEAD), [cfg], launched_before()) == "done"
    assert capsys.readouterr().err == "syncbn: rank 1 died: restart 1 of 3, going on from step 40\n"


def launched_before():
    restarts = Restarts(3)
    restarts.since -= 60.0
    return restarts


def test_a_run_that_is_to_begin_anew_goes_on_from_what_it_has_saved_and_from_nothing_else(cfg):
    cfg = replace(cfg, train=replace(cfg.train, resume=False))
    begun(cfg, saved=40)
    for restarts, resumes in ((Restarts(3), False), (launched_before(), True)):
        attempt = failing(DEAD)
        healed(attempt, [cfg], restarts)
        assert [runs[0].train.resume for runs in attempt.given] == [False, resumes]


def test_the_journal_tells_of_an_attempt_that_could_not_say_how_it_ended(cfg):
    begun(cfg, saved=40)
    healed(failing(DEAD), [cfg], launched_before())
    start, end, restart = events(cfg)
    assert start["attempt"] == 1
    assert (end["event"], end["status"]) == ("end", "failed")
    assert end["error"].startswith("InfrastructureError: rank 1 died")
    told = {"event": "restart", "number": 1, "attempt": 1, "reason": "rank 1 died", "from_step": 40}
    assert {key: restart[key] for key in told} == told


@pytest.mark.parametrize(("error", "status"), [(DEAD, "failed"), (Stopped(15), "stopped")])
def test_a_launch_that_gives_up_ends_the_attempt_too(cfg, error, status):
    begun(cfg)
    with pytest.raises(type(error)):
        healed(failing(error), [cfg], replace_most(launched_before(), 0))
    assert [(e["event"], e.get("status")) for e in events(cfg)] == [
        ("start", None),
        ("end", status),
    ]


def replace_most(restarts, most):
    restarts.most = most
    return restarts


def test_attempts_before_the_first_checkpoint_stay_one_run_with_one_beginning(cfg):
    begun(cfg)
    (began, *_) = events(cfg)
    healed(failing(DEAD), [cfg], launched_before())
    journal = Journal(cfg.folder / "journal.jsonl")
    journal.begin(0)
    journal.close()
    assert [e["event"] for e in events(cfg)] == ["start", "end", "restart", "start"]
    assert events(cfg)[0]["time"] == began["time"]
    assert events(cfg)[-1]["attempt"] == 2
    assert not [r for r in read_journal(journal.path) if "metrics" in r]


def test_the_next_attempt_ends_one_that_nobody_could(cfg):
    begun(cfg, saved=40)
    journal = Journal(cfg.folder / "journal.jsonl")
    journal.begin(40)
    journal.close()
    _, end, start = events(cfg)
    assert (end["event"], end["status"], start["attempt"]) == ("end", "failed", 2)
    assert "ended without a message" in end["error"]


def test_the_journal_of_an_earlier_launch_is_left_as_it_is(cfg):
    begun(cfg, saved=40)
    before = (cfg.folder / "journal.jsonl").read_bytes()
    healed(failing(DEAD), [cfg], Restarts(3))
    assert (cfg.folder / "journal.jsonl").read_bytes() == before


def test_a_folder_that_another_job_holds_is_not_waited_for(cfg, monkeypatch):
    monkeypatch.setattr(module, "LEFT_S", 1e9)
    with RunLock(cfg.folder), pytest.raises(FolderInUse):
        healed(failing(FolderInUse("in use")), [cfg], Restarts(3))


def test_a_rank_that_is_still_there_has_left_before_the_next_attempt(cfg, monkeypatch):
    monkeypatch.setattr(module, "LEFT_S", 60.0)
    lock = RunLock(cfg.folder)
    lock.__enter__()
    threading.Timer(0.3, lambda: lock.__exit__(None, None, None)).start()

    def attempt(runs):
        left.append(lock._file is None)
        if len(left) == 1:
            raise DEAD

    left = []
    healed(attempt, [cfg], Restarts(3))
    assert left == [False, True]


def test_a_wave_goes_on_with_the_trials_that_have_neither_finished_nor_failed(cfg, capsys):
    wave = [Trial("sync", n, replace(cfg, name=f"study/trials/sync-{n}")) for n in range(3)]
    taken = []

    def run(trials, processes):
        assert processes == 2
        taken.append([trial.seed for trial in trials])
        if len(taken) == 1:
            note_failure(wave[0].config.folder, DataError("no data"))
            raise DEAD

    healed_waves(wave[0].config, run)(wave, 2)
    assert taken == [[0, 1, 2], [1, 2]]
    assert "going on with 2 of 3 trials" in capsys.readouterr().err


def test_a_signal_between_two_attempts_stops_the_launch(cfg, monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 60.0)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), 15)).start()
    attempt = failing(DEAD)
    with pytest.raises(Stopped, match="before a checkpoint could be saved"):
        healed(attempt, [cfg], Restarts(3))
    assert len(attempt.given) == 1
