"""A sweep in words: its keys, its measure, its trials; figure, tables and pages share them.

A summary here is the one of a sweep, as `syncbn.compare.sweep.results` makes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.compare.measure import Measure
from syncbn.compare.report.words.numbers import labelled, value_words
from syncbn.compare.report.words.text import counted, listed

SweepSummary = Mapping[str, Any]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by its last part, where no other key has the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }


def setting_words(trial: Mapping[str, Any]) -> str:
    """A trial by its settings: `optim.lr=0.1, model=cnn`."""
    return ", ".join(f"{key}={text}" for key, text in trial["texts"].items())


def measure_words(summary: SweepSummary) -> str:
    """What trials are ranked by: "test error"."""
    return Measure(**summary["measure"]).words


def measured(summary: SweepSummary, value: float | None) -> str:
    """A value of the measure; in percent where it is a share of the samples."""
    return value_words(Measure(**summary["measure"]), value)


def measure_label(summary: SweepSummary) -> str:
    """The measure as an axis or column is headed."""
    return labelled(Measure(**summary["measure"]))


def value_of(summary: SweepSummary, trial: Mapping[str, Any]) -> float | None:
    """What a trial is ranked by; None where it failed, or measured no finite number."""
    return trial["final"].get(summary["measure"]["name"])


def best_of(summary: SweepSummary) -> Mapping[str, Any] | None:
    """The best trial, None where none has a number."""
    return next((t for t in summary["trials"] if t["name"] == summary["best"]), None)


def headline(summary: SweepSummary) -> str:
    """The best trial in one sentence."""
    best = best_of(summary)
    if best is None:
        return f"None of {len(summary['trials'])} trials has a {measure_words(summary)}"
    value = measured(summary, value_of(summary, best))
    of = counted(len(summary["trials"]), "trial", "trials")
    return f"Best of {of}: {measure_words(summary)} {value} with {setting_words(best)}"


def tally(summary: SweepSummary) -> str:
    """How many trials ended how: `10 finished, 1 diverged and 1 failed`."""
    states = [trial["status"] for trial in summary["trials"]]
    counts = {state: states.count(state) for state in ("finished", "diverged", "failed")}
    return listed([f"{count} {state}" for state, count in counts.items() if count])
