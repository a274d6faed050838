"""The ledger of all studies: an entry a study with its state, verdicts and seconds, and the table of them.

Entries are kept from one launch to the next, so that an interrupted launch, or a single study that ran again, leaves
one table of all studies, and a launch that had nothing left to train does not replace the time that training took.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncbn.compare.report.words.numbers import time_words
from syncbn.compare.report.words.text import aligned, markdown_table
from syncbn.compare.statistics.claims import VERDICTS
from syncbn.compare.study.summary import Summary
from syncbn.compare.suite.tiers import Launch

Entry = Mapping[str, Any]
FILE = "studies.json"
HEADER = ("study", "state", *map(str.lower, VERDICTS), "time", "question")


class Ledger:
    """The entries in studies.json of a runs folder, and studies.md beside it; both are rewritten with each entry."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.entries = read(runs_dir)

    def note(self, entry: Entry, seconds: float, trained: bool) -> None:
        """Keep `entry` in place of the study's earlier one; see `timed`."""
        name = entry["study"]
        self.entries[name] = timed(entry, seconds, trained, self.entries.get(name))
        self.entries = dict(sorted(self.entries.items(), key=lambda e: (e[1]["order"], e[0])))
        kept = list(self.entries.values())
        _write_atomically(self.runs_dir / FILE, json.dumps(to_dict(kept), indent=2) + "\n")
        _write_atomically(self.runs_dir / "studies.md", markdown(kept))


def entry(
    launch: Launch, state: str, code: int, note: str, summary: Summary | None
) -> dict[str, Any]:
    """What is kept of a study; `summary` is None where it has none from this launch."""
    claims = [] if summary is None else summary["claims"]
    return {
        "study": launch.name,
        "question": launch.question,
        "order": launch.order,
        "state": state,
        "code": code,
        "note": note,
        "seconds": 0.0,
        "budget_s": launch.budget_s,
        "verdicts": {claim["name"]: claim["verdict"] for claim in claims},
    }


def timed(entry: Entry, seconds: float, trained: bool, before: Entry | None) -> dict[str, Any]:
    """`entry` with the time that the study has taken: over its launches until it is finished.

    Args:
        entry: of this launch.
        seconds: that this launch took.
        trained: whether it finished any trial; one that only made its report again took no time to speak of.
        before: the study's entry of an earlier launch.
    """
    if before is None:
        return {**entry, "seconds": seconds}
    if not trained:
        return {**entry, "seconds": before["seconds"] or seconds}
    return {**entry, "seconds": seconds + (before["seconds"] if before["code"] else 0.0)}


def read(runs_dir: Path) -> dict[str, dict[str, Any]]:
    """The entries kept in `runs_dir` by study; none where there is no such file, or half of one."""
    try:
        kept = json.loads((runs_dir / FILE).read_text())["studies"]
        return {entry["study"]: entry for entry in kept}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_atomically(path: Path, text: str) -> None:
    """Put `text` at `path` at once: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


def to_dict(entries: Sequence[Entry]) -> dict[str, Any]:
    """Entries and their time."""
    return {"seconds": total(entries), "studies": [dict(entry) for entry in entries]}


def total(entries: Sequence[Entry]) -> float:
    """Seconds of all entries."""
    return sum(entry["seconds"] for entry in entries)


def text(entries: Sequence[Entry]) -> str:
    """The table for a terminal."""
    return "\n".join(
        [aligned(HEADER, [_row(entry) for entry in entries]), "", _conclusion(entries)]
    )


def markdown(entries: Sequence[Entry]) -> str:
    """The table as a page; each study's report lies beside it, in the folder of its name."""
    failures = [
        f"- {entry['study']}: {entry['state']}" + (f" ({entry['note']})" if entry["note"] else "")
        for entry in entries
        if entry["code"]
    ]
    parts = ["# Studies", markdown_table(HEADER, [_row(e) for e in entries]), _conclusion(entries)]
    return "\n\n".join([*parts, *(["\n".join(failures)] if failures else [])]) + "\n"


def _row(entry: Entry) -> tuple[str, ...]:
    found = list(entry["verdicts"].values())
    counts = (str(found.count(word)) if found else "" for word in VERDICTS)
    return (
        entry["study"],
        entry["state"],
        *counts,
        time_words(entry["seconds"]) + _over(entry),
        entry["question"],
    )


def _over(entry: Entry) -> str:
    """A remark where a study took longer than it declares."""
    budget = entry["budget_s"]
    return f" of {time_words(budget)}" if 0 < budget < entry["seconds"] else ""


def _conclusion(entries: Sequence[Entry]) -> str:
    found = [word for entry in entries for word in entry["verdicts"].values()]
    done = sum(entry["code"] == 0 for entry in entries)
    counts = ", ".join(f"{found.count(word)} {word.lower()}" for word in VERDICTS)
    return f"{done} of {len(entries)} studies done; claims: {counts}; {time_words(total(entries))} in all"
