"""The trials of a sweep as rows of words, best first, for the terminal and for reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.compare.report.words.numbers import NOTHING, number, value_words
from syncbn.compare.report.words.sweep import (
    SweepSummary,
    headline,
    measure_words,
    measured,
    short_keys,
    tally,
    value_of,
)
from syncbn.compare.report.words.text import capital

if TYPE_CHECKING:
    from rich.console import Console

MOST_ROWS, MOST_FAILURES = 40, 5
"""In the terminal; the report has all."""


def trial_header(summary: SweepSummary) -> list[str]:
    """The head of `trial_rows`."""
    names = short_keys(list(summary["keys"]))
    return ["", *names.values(), measure_words(summary), "train loss", "steps", "time"]


def trial_rows(summary: SweepSummary) -> list[list[str]]:
    """A row a trial under `trial_header`; one without a result says why in place of its measure."""
    return [_row(summary, place, trial) for place, trial in enumerate(summary["trials"], start=1)]


def _row(summary: SweepSummary, place: int, trial: Mapping[str, Any]) -> list[str]:
    texts = list(trial["texts"].values())
    if trial["exit_code"]:
        return [NOTHING, *texts, trial["status"], NOTHING, _steps(trial), NOTHING]
    return [
        str(place),
        *texts,
        measured(summary, value_of(summary, trial)),
        number(trial["final"].get("train_loss")),
        _steps(trial),
        value_words("seconds", trial["seconds"]),
    ]


def _steps(trial: Mapping[str, Any]) -> str:
    return NOTHING if trial["steps"] is None else str(trial["steps"])


def failure_rows(summary: SweepSummary) -> list[tuple[str, str]]:
    """Settings and error of each trial that did not end well."""
    return [(t["overrides"], t["error"]) for t in summary["trials"] if t["exit_code"]]


def print_table(summary: SweepSummary, console: "Console", folder: Path) -> None:
    """Print the trials, what failed, and where the report is; texts of users are never markup."""
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    title = f"{summary['sweep']}: {tally(summary)}, by {measure_words(summary)}"
    table = Table(title=plain(title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.pad_edge, table.collapse_padding = False, True
    for name in trial_header(summary):
        table.add_column(plain(capital(name)), overflow="fold")
    rows = trial_rows(summary)
    for row in rows[:MOST_ROWS]:
        table.add_row(*map(plain, row))
    console.print(table)
    lines = [f"... and {len(rows) - MOST_ROWS} more in the report"] if len(rows) > MOST_ROWS else []
    lines += [
        f"  {overrides}: {error}" for overrides, error in failure_rows(summary)[:MOST_FAILURES]
    ]
    lines += [f"{headline(summary)}.", f"Report: {folder / 'report.html'}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
