"""A sweep as parallel coordinates: an axis a swept key, a line a trial, coloured by what the trial came to.

Axes of numbers are logarithmic where their values span a decade or more. Trials with the same value are drawn a little
apart, ordered by their outcome, so that up to about a hundred lines can be followed.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.compare.report.figures.canvas import SOFT, Picture, finish, new_figure, styled
from syncbn.compare.report.words.sweep import (
    SweepSummary,
    headline,
    measure_label,
    measure_words,
    measured,
    short_keys,
    tally,
    value_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT, AXIS_WIDTH, WIDEST = 5.2, 1.55, 18.0
"""Inches: of the figure, between two axes, and of the widest figure."""
FAILED_AT = 1.12
"""Where lines of trials without an outcome end, over the axis of outcomes, which ends at 1."""
CLOSEST = 0.05
"""Between two labels of an axis, as a share of its height."""
LONGEST = 18
"""Letters of a label."""
_FAILED = "#8a8a8a"


@dataclass(frozen=True)
class Scale:
    """An axis: where each value lies from 0 (bottom) to 1, and its labels."""

    places: Mapping[str, float]
    """By the value as a setting has it."""
    labels: Mapping[float, str]


def parallel_coordinates(summary: SweepSummary) -> Picture:
    """All trials of a sweep over the axes of its keys and its measure."""
    with styled():
        keys = list(summary["keys"])
        figure = new_figure(HEIGHT)
        figure.set_figwidth(min(WIDEST, max(figure.get_figwidth(), AXIS_WIDTH * (len(keys) + 1.6))))
        axes = figure.add_subplot()
        axes.axis("off")
        lines = max(_wrapped(name).count("\n") for name in short_keys(keys).values())
        axes.set_xlim(-0.35, len(keys) + 0.5)
        axes.set_ylim(-0.04, _head(summary) + 0.07 + 0.06 * lines)
        scales = {key: _scale_in(summary, key) for key in keys}
        _draw_trials(axes, summary, scales)
        _draw_axes(axes, summary, scales)
        caption = " ".join(_caption(summary))
        title = textwrap.shorten(headline(summary), 190, placeholder=" ...")
        unbroken = title.replace(" %", "\N{NO-BREAK SPACE}%")
        return finish(figure, "parallel_coordinates", unbroken, caption)


def _caption(summary: SweepSummary) -> Iterator[str]:
    yield f"A line a trial ({tally(summary)}), from its settings to its {measure_words(summary)} in the end."
    if summary["best"] is not None:
        yield "The thick line is the best."
    if any(trial["exit_code"] for trial in summary["trials"]):
        yield "Dashed grey: it diverged or failed."


def _head(summary: SweepSummary) -> float:
    """Where the names of the axes stand: over the place of trials without a result, where there are some."""
    return FAILED_AT + 0.07 if any(trial["exit_code"] for trial in summary["trials"]) else 1.06


def _scale_in(summary: SweepSummary, key: str) -> Scale:
    """The axis of a key, its values in the order in which they were given."""
    given = summary["keys"][key]
    pairs = sorted(
        ((t["texts"][key], t["settings"][key]) for t in summary["trials"]),
        key=lambda pair: given.index(pair[1]),
    )
    return scale_of([text for text, _ in pairs], [value for _, value in pairs])


def scale_of(texts: Sequence[str], values: Sequence[Any]) -> Scale:
    """The axis of a key, from the value of every trial, as text and plain."""
    plain = dict(zip(texts, values, strict=True))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in plain.values())
    at = placed(list(plain.values()), ratio=10) if numbers else _spaced(len(plain))
    places = dict(zip(plain, at, strict=True))
    return Scale(places, thinned({place: _shortened(text) for text, place in places.items()}))


def placed(values: Sequence[float], ratio: float) -> list[float]:
    """Where numbers lie from 0 to 1; by their logarithms where the largest is `ratio` times the smallest or more."""
    if min(values) > 0 and max(values) >= ratio * min(values):
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def thinned(labels: Mapping[float, str]) -> dict[float, str]:
    """Those of `labels` that leave `CLOSEST` between each other; both ends stay."""
    places = sorted(labels)
    kept = [places[-1]]
    for place in places[:-1]:
        lower = [other for other in kept if other != places[-1]]
        if (not lower or place - lower[-1] >= CLOSEST) and places[-1] - place >= CLOSEST:
            kept.append(place)
    return {place: labels[place] for place in sorted(kept)}


def _spaced(number: int) -> list[float]:
    return [0.5] if number == 1 else np.linspace(0, 1, number).tolist()


def _shortened(text: str) -> str:
    text = text.strip("'\"")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 7]}...{text[-4:]}"


def _outcomes(summary: SweepSummary) -> list[float | None]:
    """Where each trial ends on the last axis; None for those without an outcome."""
    values = [value_of(summary, trial) for trial in summary["trials"]]
    known = [value for value in values if value is not None]
    least = 30 if summary["measure"]["lower_is_better"] else math.inf
    at = iter(placed(known, least) if known else [])
    return [None if value is None else next(at) for value in values]


def _draw_trials(axes: "Axes", summary: SweepSummary, scales: Mapping[str, Scale]) -> None:
    """The lines, the best last, over all others."""
    ends = _outcomes(summary)
    columns = [
        _apart([scale.places[t["texts"][key]] for t in summary["trials"]])
        for key, scale in scales.items()
    ]
    paths = [
        [*heights, FAILED_AT if end is None else end]
        for heights, end in zip(zip(*columns, strict=True), ends, strict=True)
    ]
    many = len(paths) > 40
    for place, (path, end) in reversed(list(enumerate(zip(paths, ends, strict=True)))):
        x, y = _curve(path)
        if end is None:
            axes.plot(x, y, color=_FAILED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            axes.plot(x[-1], y[-1], "x", color="#444444", markersize=6, zorder=3)
        else:
            best = place == 0
            width = 3.2 if best else 1.1 if many else 1.7
            colour = _colour(summary, end)
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=width,
                alpha=1 if best else 0.75,
                zorder=4 if best else 2,
            )


def _apart(places: Sequence[float]) -> list[float]:
    """`places` of trials from the best to the worst, those on one spot moved apart."""
    distinct = sorted(set(places))
    gap = min(np.diff(distinct), default=1.0)
    reach = float(min(0.025, 0.3 * gap))
    moved = list(places)
    for spot in distinct:
        own = [i for i, place in enumerate(places) if place == spot]
        if len(own) > 1:
            for i, offset in zip(own, np.linspace(-reach, reach, len(own)), strict=True):
                moved[i] = spot + float(offset)
    return moved


def _curve(path: Sequence[float]) -> tuple[list[float], list[float]]:
    """A line through `path` that is level at each axis."""
    steps = np.linspace(0, 1, 24)
    ease = steps * steps * (3 - 2 * steps)
    x = [i + s for i in range(len(path) - 1) for s in steps]
    y = [a + (b - a) * e for a, b in pairwise(path) for e in ease]
    return x, y


def _colour(summary: SweepSummary, end: float) -> Any:
    """From dark, the best, to light."""
    import matplotlib

    good = end if summary["measure"]["lower_is_better"] else 1 - end
    return matplotlib.colormaps["viridis"](0.92 * good)


def _draw_axes(axes: "Axes", summary: SweepSummary, scales: Mapping[str, Scale]) -> None:
    names, head = short_keys(list(scales)), _head(summary)
    for x, (key, scale) in enumerate(scales.items()):
        _axis(axes, x, head, names[key], scale.labels)
    last = len(scales)
    labels = _outcome_labels(summary)
    _axis(axes, last, head, measure_label(summary), labels)
    if labels:
        heights = np.linspace(0, 1, 129)
        for low, high in pairwise(heights):
            axes.plot(
                [last, last],
                [low, high],
                color=_colour(summary, low),
                linewidth=6,
                zorder=5,
                solid_capstyle="butt",
            )
    if any(trial["exit_code"] for trial in summary["trials"]):
        axes.text(last + 0.06, FAILED_AT, "no result", va="center", fontsize=10, color=SOFT)


def _axis(axes: "Axes", x: float, head: float, name: str, labels: Mapping[float, str]) -> None:
    """One axis with its name at the height `head`."""
    axes.plot([x, x], [0, 1], color="#333333", linewidth=1.2, zorder=5)
    axes.text(x, head, _wrapped(name), ha="center", va="bottom", fontsize=11, fontweight="bold")
    for place, label in labels.items():
        axes.plot([x - 0.02, x + 0.02], [place, place], color="#333333", linewidth=1.2, zorder=6)
        axes.text(
            x + 0.05, place, label, va="center", fontsize=9.5, zorder=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )  # fmt: skip


def _wrapped(name: str) -> str:
    """A long key over several lines, broken after a dot, an underscore or a space."""
    open_to_breaks = name.replace(".", ". ").replace("_", "_ ")
    lines = textwrap.wrap(open_to_breaks, 15)
    return "\n".join(line.replace(". ", ".").replace("_ ", "_") for line in lines)


def _outcome_labels(summary: SweepSummary) -> dict[float, str]:
    """Labels of the last axis at some of the outcomes themselves, the ends among them."""
    pairs = zip(_outcomes(summary), summary["trials"], strict=True)
    found = {
        end: measured(summary, value_of(summary, trial)).removesuffix(" %")
        for end, trial in pairs
        if end is not None
    }
    return thinned(found) if found else {}
