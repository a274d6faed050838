"""The map of a grid: in which combinations of two settings each arm trains.

A cell shows its median error as a colour and as a number, and has a frame where every seed trained, so the map can be
read in grey.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.compare.measure import DEFAULT, Measure, decided_by, measure
from syncbn.compare.report.figures.canvas import Picture, finish, panels
from syncbn.compare.report.figures.series import Trials
from syncbn.compare.report.words.numbers import labelled, number
from syncbn.compare.report.words.study import arm_words, setting
from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.summary import (
    Cell,
    Summary,
    among,
    array_of,
    cells_of,
    contrast,
    is_grid,
    median_of,
    shown_arms,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORDS = {"optim.lr": "Learning rate", "model.init_std": "Standard deviation of initial weights"}


def has_grid(summary: Summary, _: Trials) -> bool:
    """Whether the study has a grid."""
    return is_grid(summary)


def axis_words(key: str) -> str:
    """A grid's key as its axis is named."""
    return _WORDS.get(key, key)


def trained(summary: Summary, arm: str) -> tuple[int, int] | None:
    """Of how many seeds the error is at the target or better, and of how many in all; None without a target."""
    decides, target = decided_by(summary), summary["design"].get("target")
    errors = array_of(summary, arm, decides.name)
    return None if target is None else (int(decides.better(errors, target).sum()), len(errors))


def rows_and_columns(summary: Summary) -> tuple[list[Cell], list[float]]:
    """The grid's values: of all keys but the last together, one a row, and of the last, one a column."""
    cells = list(cells_of(summary, shown_arms(summary)[0]))
    return list(dict.fromkeys(c[:-1] for c in cells)), list(dict.fromkeys(c[-1] for c in cells))


def cell_map(summary: Summary, _: Trials) -> Picture:
    """The median test error of every cell, a panel an arm."""
    families = shown_arms(summary)
    rows, columns = rows_and_columns(summary)
    side_by_side = len(columns) < 6 and len(families) > 1
    figure, axes, _strip = panels(len(families), 2 if side_by_side else 1, 0.9 + 0.5 * len(rows))
    mesh: Any = None
    for panel, family in zip(axes, families, strict=True):
        mesh = _panel(panel, summary, family)
        panel.set_title(_panel_title(summary, family), loc="left", fontsize=12)
    figure.colorbar(mesh, ax=axes, label=labelled(decided_by(summary)), shrink=0.8)
    keys = list(summary["design"]["grid"])
    figure.supylabel(", ".join(map(axis_words, keys[:-1])) or " ", fontsize=11)
    caption = f"{setting(summary)}. Numbers: median {_in_percent(summary)}; div.: diverged. {_frame_words(summary)}"
    return finish(figure, "cell_map", _title(summary), caption)


def _frame_words(summary: Summary) -> str:
    target = summary["design"].get("target")
    if target is None:
        return ""
    decides = decided_by(summary)
    goal = f"{decides.factor * target:g} {decides.unit}".rstrip()
    way = "less" if decides.lower_is_better else "more"
    return f"Framed: {goal} or {way} in every seed; k/n: in k of n seeds; neither: in none."


def _in_percent(summary: Summary) -> str:
    decides = decided_by(summary)
    return f"{decides.words} in %" if decides.is_share else decides.words


def _panel(axes: "Axes", summary: Summary, family: str) -> Any:
    rows, columns = rows_and_columns(summary)
    cells = cells_of(summary, family)
    errors = np.array([[_error(summary, cells[(*r, c)]) for c in columns] for r in rows])
    axes.grid(visible=False)
    decides = decided_by(summary)
    low, high = _scale(summary)
    colours = "viridis_r" if decides.lower_is_better else "viridis"
    mesh = axes.pcolormesh(
        decides.factor * errors, cmap=colours, vmin=low, vmax=high, edgecolor="white"
    )
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            counts = trained(summary, cells[(*row, column)])
            words = cell_words(errors[y, x], counts, decides)
            _cell(axes, (x, y), words, _is_dark(summary, errors[y, x]), counts)
    axes.set_xticks(np.arange(len(columns)) + 0.5, [f"{value:g}" for value in columns])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [", ".join(f"{v:g}" for v in r) for r in rows])
    axes.tick_params(length=0)
    axes.set_xlabel(axis_words(list(summary["design"]["grid"])[-1]))
    return mesh


def _error(summary: Summary, arm: str) -> float:
    median = median_of(summary, arm, decided_by(summary).name)
    return np.nan if median is None else median


def _scale(summary: Summary) -> tuple[float, float]:
    """The ends of the colours: 0 and 100 %, or the smallest and the largest median of all cells."""
    decides = decided_by(summary)
    if decides.is_share:
        return 0.0, 100.0
    families = [cells_of(summary, family).values() for family in shown_arms(summary)]
    medians = [median_of(summary, arm, decides.name) for arms in families for arm in arms]
    known = [median for median in medians if median is not None] or [0.0]
    return min(known), max(known)


def _is_dark(summary: Summary, error: float) -> bool:
    """Whether a cell's colour asks for white words: beyond the middle, on the side of what is bad."""
    decides, (low, high) = decided_by(summary), _scale(summary)
    place = (decides.factor * error - low) / (high - low) if high > low else 0.0
    return bool((place if decides.lower_is_better else 1 - place) > 0.55)


def _cell(
    axes: "Axes",
    place: tuple[int, int],
    words: str,
    dark: bool,
    counts: tuple[int, int] | None,
) -> None:
    """The cell's words, in a frame where every seed trained."""
    x, y = place
    colour = "white" if dark else "black"
    drawn = {"ha": "center", "va": "center", "color": colour, "fontsize": 11}
    axes.text(x + 0.5, y + 0.5, words, **drawn)
    if counts is not None and counts[0] == counts[1]:
        frame = np.array([(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94), (0.06, 0.06)])
        axes.plot(*(frame + place).T, color="black", linewidth=2.2)


def cell_words(error: float, counts: tuple[int, int] | None, decides: Measure) -> str:
    """The median (in percent of a share), `div.` where it diverged, and how many seeds trained where it was some."""
    words = _percent(error) if decides.is_share else number(error, 2)
    words = "div." if math.isnan(error) or (error == 1 and decides == measure(DEFAULT)) else words
    some = counts is not None and 0 < counts[0] < counts[1]
    return f"{words}\n{counts[0]}/{counts[1]}" if some and counts else words


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"


def _counts(summary: Summary, family: str) -> tuple[Floats, int]:
    """Cells that trained, one number a seed, and cells in all."""
    return array_of(summary, family, "cells_trained"), len(cells_of(summary, family))


def _panel_title(summary: Summary, family: str) -> str:
    counts, total = _counts(summary, family)
    return f"{family}: {np.median(counts):g} of {total} train" if len(counts) else family


def _title(summary: Summary) -> str:
    """In how many cells each contrasted arm trains, and the ratio."""
    pair = among(contrast(summary, "cells_trained"), shown_arms(summary))
    known = {arm: _counts(summary, arm) for arm in pair}
    if any(not len(counts) for counts, _ in known.values()):
        return f"Median {decided_by(summary).words} in the {len(cells_of(summary, pair[0]))} cells of the grid"
    words = [f"{np.median(c):g} of {n} with {arm_words(arm)}" for arm, (c, n) in known.items()]
    ends = [float(np.median(counts)) for counts, _ in known.values()]
    ratio = f" ({number(ends[-1] / ends[0])} times as many)" if len(ends) == 2 and ends[0] else ""
    return f"Combinations that train: {', '.join(words)}{ratio}"
