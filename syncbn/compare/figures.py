"""The figures of a study, each titled with what it found.

The decision that shaped the file: a title is computed from the numbers under it, so a figure can contradict
what was hoped for but never itself. Curves come from the trials, everything else from the summary.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.compare import curves, statistics
from syncbn.compare.canvas import HEIGHT, SOFT, Look, Picture, finish, looks, new_figure, styled
from syncbn.compare.records import TrialRecord
from syncbn.compare.statistics import Floats
from syncbn.compare.wording import (
    arm_words,
    axis_label,
    comparison_words,
    contrast,
    contrast_title,
    effect_words,
    is_share,
    median_of,
    number,
    setting,
    tally,
    threshold_words,
    value_words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Summary = Mapping[str, Any]
VERDICT_COLOURS = {"REPRODUCED": "#0072b2", "NOT REPRODUCED": "#d55e00", "INCONCLUSIVE": SOFT}


def draw(summary: Summary, trials: Sequence[TrialRecord]) -> list[Picture]:
    """All figures of a study that its numbers allow, in the order in which a report shows them."""
    with styled():
        pictures = [_error_by_arm(summary)]
        pictures += [_paired_differences(summary)] if _judged(summary) else []
        pictures += [curves.convergence(summary, trials)]
        pictures += [curves.training_loss(summary, trials)] if curves.any_loss(trials) else []
        return [*pictures, _seconds(summary)]


def _error_by_arm(summary: Summary) -> Picture:
    title = contrast_title(summary, "test_error", "error")
    caption = f"{setting(summary)}. A mark a seed, a bar at the median."
    return _dots_by_arm(summary, "test_error", "error_by_arm", title, caption)


def _seconds(summary: Summary) -> Picture:
    caption = (
        f"{setting(summary)}. Wall time of training a trial; a mark a seed, a bar at the median."
    )
    return _dots_by_arm(summary, "seconds", "seconds", _seconds_title(summary), caption)


def _seconds_title(summary: Summary) -> str:
    against, arm = contrast(summary)
    logs = statistics.paired_log_ratios(
        *(summary["arms"][name]["seconds"] for name in (arm, against))
    )
    ratio = statistics.effect(logs)
    if np.isnan(ratio.median):
        return f"{arm} or {against} has trials that diverged before they could be timed"
    low, middle, high = np.exp([ratio.interval.low, ratio.median, ratio.interval.high])
    interval = f" (95 % interval {number(low)} to {number(high)})" if np.isfinite(high) else ""
    return f"{arm} takes {number(middle)} times as long as {against}{interval}"


def _dots_by_arm(summary: Summary, metric: str, name: str, title: str, caption: str) -> Picture:
    """A row an arm with each seed's value of `metric`, in percent where it is a share."""
    arms = summary["arms"]
    figure = new_figure(max(HEIGHT - 0.8, 1.4 + 0.5 * len(arms)))
    axes = figure.subplots()
    for row, (arm, look) in enumerate(looks(list(arms)).items()):
        values = np.array(arms[arm][metric], dtype=float) * (100 if is_share(metric) else 1)
        _row_of_dots(axes, row, values, look)
        words = value_words(metric, median_of(summary, arm, metric))
        axes.annotate(words, (1.01, row), xycoords=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(arms)), [_two_lines(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlim(0, 1.03 * axes.get_xlim()[1])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{axis_label(summary, metric)}, medians at the right")
    return finish(figure, name, title, caption)


def _row_of_dots(axes: "Axes", row: int, values: Floats, look: Look) -> None:
    spread = row + np.linspace(-0.2, 0.2, len(values)) * (len(values) > 1)
    axes.plot(values, spread, look.marker, color=look.colour, alpha=0.75, markersize=7)
    axes.vlines(np.median(values), row - 0.36, row + 0.36, color=look.colour, linewidth=2.5)


def _two_lines(arm: str) -> str:
    """The arm's name, and under it what it means where that is known."""
    words = arm_words(arm)
    return arm if words == arm else f"{arm}\n{words}"


def _judged(summary: Summary) -> list[Mapping[str, Any]]:
    """Claims with a number for every pair, which can be drawn."""
    return [claim for claim in summary["claims"] if None not in claim["pairs"]]


def _paired_differences(summary: Summary) -> Picture:
    judged = _judged(summary)
    figure = new_figure(max(HEIGHT - 1.0, 0.9 + 1.55 * len(judged)))
    rows = np.atleast_1d(figure.subplots(len(judged), 1))
    for axes, claim in zip(rows, judged, strict=True):
        _claim_row(axes, claim)
    words = tally(summary["claims"])
    caption = (
        f"{setting(summary)}. A dot a seed; diamond: median; line: 95 % interval; thick: 90 % interval of "
        "the equivalence test; shaded: what the claim demands."
    )
    return finish(figure, "paired_differences", words, caption)


def _claim_row(axes: "Axes", claim: Mapping[str, Any]) -> None:
    scale = 100 if is_share(claim["metric"]) and claim["scale"] == "difference" else 1
    colour = VERDICT_COLOURS[claim["verdict"]]
    pairs = scale * np.array(claim["pairs"])
    height = np.linspace(0.35, 0.75, len(pairs))
    axes.plot(pairs, height, "o", color=SOFT, alpha=0.7, markersize=6)
    _bar(axes, claim["ci"], scale, colour, 2)
    _bar(axes, claim["ci90"], scale, colour, 6)
    axes.plot(scale * claim["effect"], 0, "D", color=colour, markersize=9, zorder=3)
    _demand(axes, claim, scale)
    axes.set(ylim=(-0.35, 1), yticks=[], xlabel=_pairs_label(claim))
    axes.spines["left"].set_visible(False)
    found = f"{claim['verdict']}: {effect_words(claim, claim['effect'])}, claimed {threshold_words(claim)}"
    axes.set_title(f"{claim['name']}  ·  {found}", loc="left", fontsize=11, color=colour)


def _bar(
    axes: "Axes", ends: Sequence[float | None] | None, scale: int, colour: str, width: int
) -> None:
    if ends is not None and None not in ends:
        axes.hlines(0, *(scale * np.array(ends, dtype=float)), color=colour, linewidth=width)


def _demand(axes: "Axes", claim: Mapping[str, Any], scale: int) -> None:
    """Shade what the claim demands, with a line at each of its edges, and show no effect for scale."""
    ratio = claim["scale"] == "ratio"
    edges = [scale * claim["threshold"]]
    if claim["kind"] == "equivalent":
        edges.append(1 / edges[0] if ratio else -edges[0])
    axes.axvline(1 if ratio else 0, color=SOFT, linewidth=0.8)
    for edge in edges:
        axes.axvline(edge, color="black", linestyle="--", linewidth=1.2)
    low, high = axes.get_xlim()
    ends = {"less": (low, edges[0]), "greater": (edges[0], high), "equivalent": sorted(edges[:2])}
    axes.axvspan(*ends[claim["kind"]], color="#e8f0d8", zorder=0)
    axes.set_xlim(low, high)


def _pairs_label(claim: Mapping[str, Any]) -> str:
    shares = is_share(claim["metric"]) and claim["scale"] == "difference"
    unit = " (points)" if shares else " (ratio)" if claim["scale"] == "ratio" else ""
    return comparison_words(claim) + unit
