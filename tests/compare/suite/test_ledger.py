"""The ledger of all studies: what is kept of each from launch to launch, its times, its table."""

import json

from syncbn.compare.suite import ledger
from syncbn.compare.suite.ledger import Ledger, entry
from syncbn.compare.suite.tiers import Launch


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


def test_a_damaged_ledger_counts_as_empty(tmp_path):
    (tmp_path / "studies.json").write_text('{"studies": [')
    assert ledger.read(tmp_path) == {}
