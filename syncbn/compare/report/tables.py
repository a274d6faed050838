"""The tables of a report as rows of words: arms, claims, cells of a grid, what was tuned, what was published.

Markdown, HTML and the terminal render the same rows, so each number is rounded and worded in one place. A table has the
columns that its study has numbers for, and no others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.compare.measure import Measure, decided_by, primary_of, shown
from syncbn.compare.report.figures.dots import arrivals
from syncbn.compare.report.figures.grids import axis_words, rows_and_columns, trained
from syncbn.compare.report.words.claims import (
    effect_words,
    interval_words,
    threshold_words,
    without_unit,
)
from syncbn.compare.report.words.numbers import NOTHING, p_cell, range_words, value_words
from syncbn.compare.report.words.study import split_words
from syncbn.compare.statistics import effects
from syncbn.compare.study.summary import (
    Summary,
    arms_with,
    array_of,
    cells_of,
    is_grid,
    median_of,
    shown_arms,
    values_of,
)

CLAIM_HEADER = ("claim", "verdict", "effect", "95 % interval", "claimed", "p (Holm)")


@dataclass(frozen=True)
class Table:
    """A table with what stands above it."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Column = tuple[str, Callable[[str], str]]
"""The head of a column, and the cell of an arm."""


def arm_header(summary: Summary) -> tuple[str, ...]:
    """The head of `arm_rows`."""
    return tuple(head for head, _ in _columns(summary))


def arm_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row an arm under `arm_header`; with a grid, an arm with all its cells."""
    columns = _columns(summary)
    return [tuple(cell(arm) for _, cell in columns) for arm in shown_arms(summary)]


def _columns(summary: Summary) -> list[Column]:
    name: list[Column] = [("arm", lambda arm: arm)]
    if is_grid(summary):
        return name + _grid_columns(summary)
    return [
        *name,
        *_primary_columns(summary),
        *_error_columns(summary),
        *_batch_column(summary),
        *_target_columns(summary),
        ("median time", lambda arm: value_words("seconds", median_of(summary, arm, "seconds"))),
    ]


def _primary_columns(summary: Summary) -> list[Column]:
    """Median and interval of what the study is about, where no other column has it."""
    metric, of = primary_of(summary), shown(summary, primary_of(summary))
    if metric in (decided_by(summary).name, "steps_to_target") or not arms_with(summary, metric):
        return []
    words = f"median {split_words(summary, metric)}"
    return [
        (words, lambda arm: value_words(of, median_of(summary, arm, metric))),
        ("its 95 % interval", lambda arm: range_words(of, *_interval(summary, arm, metric))),
    ]


def _error_columns(summary: Summary) -> list[Column]:
    of = decided_by(summary)
    metric = of.name
    if not any(values_of(summary, arm, metric) for arm in shown_arms(summary)):
        return []
    return [
        (
            f"median {split_words(summary, metric)}",
            lambda arm: value_words(of, median_of(summary, arm, metric)) + _lost(summary, arm),
        ),
        ("95 % interval", lambda arm: range_words(of, *_interval(summary, arm, metric))),
        ("range over seeds", lambda arm: _range(of, values_of(summary, arm, metric))),
    ]


def _lost(summary: Summary, arm: str) -> str:
    number = sum(map(bool, values_of(summary, arm, "diverged")))
    return f" ({number} diverged)" if number else ""


def _interval(summary: Summary, arm: str, metric: str) -> tuple[float | None, float | None]:
    """95 % interval of the median over seeds, without ends where there are too few."""
    interval = effects.effect(array_of(summary, arm, metric)).interval
    if interval == effects.NO_BOUNDS:
        return None, None
    if not shown(summary, metric).is_share:
        return interval.low, interval.high
    return max(0.0, interval.low), min(1.0, interval.high)  # a t interval knows no such bounds


def _range(metric: Measure, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return range_words(metric, min(known), max(known)) if known else NOTHING


def _batch_column(summary: Summary) -> list[Column]:
    """How many samples share statistics, where arms differ in that."""
    batches = summary["design"].get("normalisation_batch") or {}
    if len({batches.get(arm) for arm in shown_arms(summary)}) < 2:
        return []
    return [("samples sharing statistics", lambda arm: str(batches.get(arm) or "none"))]


def _target_columns(summary: Summary) -> list[Column]:
    if not any("steps_to_target" in values for values in summary["arms"].values()):
        return []
    goal = summary["design"].get("target")
    head = "reached target" if goal is None else f"reached {value_words(decided_by(summary), goal)}"
    return [
        (head, lambda arm: "{0.reached} of {0.total}".format(arrivals(summary, arm))),
        ("median steps to it", lambda arm: _steps(arrivals(summary, arm).median)),
    ]


def _steps(median: float | None) -> str:
    return NOTHING if median is None else f"{median:g}"


def _grid_columns(summary: Summary) -> list[Column]:
    if not arms_with(summary, "cells_trained"):
        return [("cells", lambda arm: str(len(cells_of(summary, arm))))]
    return [
        (
            "cells that train (median)",
            lambda arm: _of_all(summary, arm, median_of(summary, arm, "cells_trained")),
        ),
        ("range over seeds", lambda arm: _counts(values_of(summary, arm, "cells_trained"))),
        ("in every seed", lambda arm: _of_all(summary, arm, _in_every_seed(summary, arm))),
    ]


def _of_all(summary: Summary, arm: str, count: float | None) -> str:
    return NOTHING if count is None else f"{count:g} of {len(cells_of(summary, arm))}"


def _counts(counts: Sequence[float | None]) -> str:
    known = [count for count in counts if count is not None]
    if not known:
        return NOTHING
    return f"{min(known):g}" + (f" to {max(known):g}" if max(known) > min(known) else "")


def _in_every_seed(summary: Summary, family: str) -> float:
    found = [trained(summary, arm) for arm in cells_of(summary, family).values()]
    return float(sum(counts is not None and counts[0] == counts[1] for counts in found))


def cell_tables(summary: Summary) -> list[Table]:
    """For a grid: each arm's cells, median error and how many seeds trained."""
    if not is_grid(summary):
        return []
    *others, last = summary["design"]["grid"]
    rows, columns = rows_and_columns(summary)
    header = [" / ".join([*others, last]), *(f"{value:g}" for value in columns)]
    beyond = "below" if decided_by(summary).lower_is_better else "above"
    note = f"Rows: {', '.join(map(axis_words, others)) or 'one'}; columns: {axis_words(last)}."
    return [
        Table(
            family,
            f"{note} Median {decided_by(summary).words}, and of how many seeds it is at the target or {beyond}.",
            header,
            [
                [
                    ", ".join(f"{v:g}" for v in row),
                    *(_cell(summary, cells_of(summary, family)[(*row, c)]) for c in columns),
                ]
                for row in rows
            ],
        )
        for family in shown_arms(summary)
    ]


def _cell(summary: Summary, arm: str) -> str:
    counts = trained(summary, arm)
    of = "" if counts is None else f" ({counts[0]}/{counts[1]})"
    decides = decided_by(summary)
    return value_words(decides, median_of(summary, arm, decides.name)) + of


def claim_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row a claim under `CLAIM_HEADER`; secondary claims say so, and their p value is not corrected."""
    return [
        (
            claim["name"] + ("" if claim["primary"] else " (secondary)"),
            claim["verdict"],
            effect_words(claim, claim["effect"]),
            without_unit(claim, interval_words(claim, claim["ci"])),
            without_unit(claim, threshold_words(claim)),
            p_cell(claim["p_holm"]),
        )
        for claim in summary["claims"]
    ]


def tuned_table(summary: Summary) -> Table | None:
    """What the search chose for each arm, and the validation errors it chose by."""
    tuned: Mapping[str, Mapping[str, Any]] = summary["design"].get("tuned") or {}
    if not tuned:
        return None
    key = next(key for key in next(iter(tuned.values())) if "." in key or key == "lr")
    rows = [
        (arm, f"{chosen[key]:g}", _tried(summary, chosen), _edge(chosen))
        for arm, chosen in tuned.items()
    ]
    decides = decided_by(summary)
    found = decides.words.replace("test", "validation", 1)
    best = "smallest" if decides.lower_is_better else "largest"
    note = (
        "Every arm was searched alike, on training samples held out for it and under other seeds than the study's; the "
        f"{best} mean {found} won. The test set was not looked at."
    )
    return Table(f"How {key} was chosen", note, ("arm", key, f"{found} by value", ""), rows)


def _tried(summary: Summary, chosen: Mapping[str, Any]) -> str:
    errors = chosen.get("errors") or {}
    tried = [
        f"{value}: {value_words(decided_by(summary), error)}" for value, error in errors.items()
    ]
    return ", ".join(tried) or "follows another arm"


def _edge(chosen: Mapping[str, Any]) -> str:
    return "at an end of the values tried" if chosen.get("at_an_end") else ""


def published_tables(summary: Summary) -> list[Table]:
    """Figures of the literature, as declared with the study."""
    return [
        Table(
            table["source"],
            table["setting"],
            ["", *table["columns"]],
            [[name, *cells] for name, cells in table["rows"].items()],
        )
        for table in summary["design"].get("published") or []
    ]


def version_rows(summary: Summary) -> list[tuple[str, str]]:
    """Packages and the state of the code."""
    return [*summary["versions"].items(), ("git", summary["git"])]
