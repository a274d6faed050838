"""The journal keeps every number exactly, and can be followed while it is written, cut back and begun anew."""

import math
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.tracking import Journal, read_journal
from syncbn.tracking.tail import Tail


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    yield journal
    journal.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path) if "metrics" in record]


def drain(tail: Tail, limit: int = 100) -> list[dict]:
    records = []
    while tail.has_new(chunk := tail.read(limit)):
        records += chunk.records
        tail.done(chunk)
    return records


@given(st.floats())
def test_a_number_comes_back_bit_for_bit(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    journal.metrics(1, {"loss": value})
    journal.close()
    (record,) = read_journal(path)
    back = float(record["metrics"]["loss"])
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_numbers_that_json_lacks_are_written_as_words(journal):
    journal.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    (record,) = read_journal(journal.path)
    assert record["metrics"] == {"a": "nan", "b": "inf", "c": "-inf"}


def test_a_record_can_be_read_as_soon_as_it_is_written(journal):
    journal.metrics(7, {"loss": 1.0})
    assert steps(journal.path) == [7]


def test_a_line_that_a_crash_left_unfinished_is_no_record(journal):
    journal.metrics(1, {"loss": 1.0})
    with journal.path.open("a") as file:
        file.write('{"step": 2, "metr')
    assert steps(journal.path) == [1]


def test_resuming_cuts_off_what_lies_beyond_the_checkpoint(journal):
    journal.begin(0)
    for step in range(1, 6):
        journal.metrics(step, {"loss": 1.0})
    journal.begin(3)
    journal.metrics(4, {"loss": 2.0})
    assert steps(journal.path) == [1, 2, 3, 4]


def test_attempts_are_counted(journal):
    journal.begin(0)
    journal.metrics(5, {"loss": 1.0})
    journal.begin(5)
    assert [r["attempt"] for r in read_journal(journal.path) if "attempt" in r] == [1, 2]


def test_an_attempt_from_the_first_step_starts_the_journal_anew(journal):
    journal.begin(0)
    journal.metrics(5, {"loss": 1.0})
    (replaced, *_) = read_journal(journal.path)
    journal.begin(0)
    (start,) = read_journal(journal.path)
    assert (start["attempt"], start["supersedes"]) == (1, replaced["time"])


def test_an_attempt_that_cannot_begin_leaves_the_journal_whole(journal):
    journal.begin(0)
    for step in range(1, 6):
        journal.metrics(step, {"loss": 1.0})
    before = journal.path.read_bytes()
    with patch("os.fsync", side_effect=OSError("disk full")), pytest.raises(OSError, match="full"):
        journal.begin(3)
    assert journal.path.read_bytes() == before


def test_a_damaged_journal_can_be_begun_anew(journal):
    journal.path.write_text("garbage\n")
    journal.begin(0)
    assert [record["attempt"] for record in read_journal(journal.path)] == [1]


def test_a_tail_gives_each_record_once(journal):
    tail = Tail(journal.path)
    seen = []
    for step in range(1, 8):
        journal.metrics(step, {"loss": 1.0})
        seen += [record["step"] for record in drain(tail, limit=2)]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_a_tail_gives_a_chunk_again_until_it_is_done(journal):
    tail = Tail(journal.path)
    journal.metrics(1, {"loss": 1.0})
    assert tail.read(10) == tail.read(10)
    assert tail.num_left() == 1


def test_a_tail_of_a_missing_file_is_empty(tmp_path):
    tail = Tail(tmp_path / "none.jsonl")
    assert drain(tail) == []
    assert tail.num_left() == 0


def test_a_tail_waits_for_the_rest_of_a_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    tail = Tail(path)
    path.write_text('{"step": 1, "met')
    assert drain(tail) == []
    path.write_text('{"step": 1, "metrics": {}}\n')
    assert drain(tail) == [{"step": 1, "metrics": {}}]


def test_a_tail_goes_past_lines_that_are_no_records(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('garbage\n[1]\n{"step": 1}\n')
    assert drain(Tail(path), limit=1) == [{"step": 1}]


def test_a_tail_starts_over_when_the_journal_was_cut_back_and_grew_again(journal):
    tail = Tail(journal.path)
    for step in range(1, 6):
        journal.metrics(step, {"loss": 1.0})
    drain(tail)
    journal.begin(2)
    for step in range(3, 20):
        journal.metrics(step, {"loss": 1.0})
    again = [record["step"] for record in drain(tail) if "step" in record]
    assert again == list(range(1, 20))
