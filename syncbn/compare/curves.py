"""The figures that run over the steps: test error and training loss, arm by arm.

The decision that shaped the file: a median and its band are drawn only where every seed has a value, and
each seed's own line runs beside them, so that neither hides what the other shows.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.compare import statistics
from syncbn.compare.canvas import Look, Picture, finish, looks, new_figure
from syncbn.compare.records import TrialRecord
from syncbn.compare.statistics import Floats
from syncbn.compare.wording import (
    axis_label,
    contrast,
    contrast_title,
    median_of,
    number,
    setting,
    value_words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Summary = Mapping[str, Any]
_READING = "Thick: median, its end in the legend; band: middle 95 % of the seeds; thin: a seed."


def shared_points(trials: Sequence[TrialRecord], metric: str) -> tuple[Floats, Floats]:
    """Steps (n,) that all `trials` have, and `metric` there, (trials, n).

    A trial that stopped early cuts the others too: a median over the seeds that were left would
    change its meaning on the way.
    """
    points = [trial.points.get(metric, {}) for trial in trials]
    shared = sorted(set.intersection(*(set(each) for each in points)))
    values = np.array([[each[step] for step in shared] for each in points], dtype=float)
    return np.array(shared, dtype=float), values


def smooth(values: Floats, window: int) -> Floats:
    """Mean over `window` neighbours along the last axis, over fewer at the ends.

    No values at all, as of an arm that diverged at once, stay none.
    """
    if values.shape[-1] == 0:
        return values
    ones = np.ones(window)
    count = np.convolve(np.ones(values.shape[-1]), ones, "same")
    return np.array([np.convolve(row, ones, "same") / count for row in values])


def convergence(summary: Summary, trials: Sequence[TrialRecord]) -> Picture:
    """Test error over the steps."""
    figure = new_figure()
    axes = figure.subplots()
    by_arm = {arm: [t for t in trials if t.arm == arm] for arm in summary["arms"]}
    for arm, look in looks(list(by_arm)).items():
        steps, values = shared_points(by_arm[arm], "test_error")
        label = f"{arm} {value_words('test_error', median_of(summary, arm, 'test_error'))}"
        _lines(axes, steps, 100 * values, look, label, marked=True)
    _over_steps(axes, axis_label(summary, "test_error"))
    axes.set_ylim(bottom=0)
    caption = f"{setting(summary)}. {_READING}"
    return finish(figure, "convergence", _convergence_title(summary, by_arm), caption)


def _convergence_title(summary: Summary, by_arm: Mapping[str, Sequence[TrialRecord]]) -> str:
    """When one arm was as good as the other ever got, or where both ended."""
    against, arm = contrast(summary)
    goal = median_of(summary, against, "test_error")
    steps, values = shared_points(by_arm[arm], "test_error")
    if goal is None or len(steps) < 2:
        return contrast_title(summary, "test_error", "error")
    there = steps[np.median(values, axis=0) <= goal]
    reached = value_words("test_error", goal)
    if not len(there):
        return f"{arm} does not get to {against}'s final {reached} error in {steps[-1]:.0f} steps"
    return (
        f"{arm} is at {against}'s final {reached} error by step {there[0]:.0f} of {steps[-1]:.0f}"
    )


def any_loss(trials: Sequence[TrialRecord]) -> bool:
    """Whether some trial recorded a training loss that a log scale can show."""
    return any(
        0 < loss < np.inf for t in trials for loss in t.points.get("train_loss", {}).values()
    )


def training_loss(summary: Summary, trials: Sequence[TrialRecord]) -> Picture:
    """Smoothed training loss over the steps."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure()
    axes = figure.subplots()
    ends: dict[str, float] = {}
    for arm, look in looks(list(summary["arms"])).items():
        steps, values = shared_points([t for t in trials if t.arm == arm], "train_loss")
        smoothed = smooth(values, max(1, len(steps) // 15))
        ends[arm] = float(np.median(smoothed[:, -1])) if len(steps) else np.nan
        _lines(axes, steps, smoothed, look, f"{arm} {number(ends[arm], 2)}", marked=False)
    _over_steps(axes, "Training loss (cross-entropy, log scale)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    against, arm = contrast(summary)
    losses = [f"{number(ends[name], 2)} for {name}" for name in (against, arm)]
    title = f"Training loss ends at {', '.join(losses)}"
    caption = f"{setting(summary)}. Running mean over a fifteenth of the steps. {_READING}"
    return finish(figure, "training_loss", title, caption)


def _lines(
    axes: "Axes", steps: Floats, values: Floats, look: Look, label: str, marked: bool
) -> None:
    """Median, band and each seed's own line; `values` is (seeds, steps), without steps a legend."""
    low, middle, high = statistics.band(values)
    marker = look.marker if marked else ""
    axes.plot(steps, values.T, color=look.colour, linewidth=0.6, alpha=0.35)
    axes.fill_between(steps, low, high, color=look.colour, alpha=0.12, linewidth=0)
    axes.plot(steps, middle, marker=marker, linestyle=look.line, color=look.colour, label=label)


def columns_of(labels: Sequence[str]) -> int:
    """How many columns of a legend fit the common width (4 of 15 letters, 1 of 40)."""
    longest = max(map(len, labels), default=0)
    return max(1, min(4, 84 // (longest + 6)))


def _over_steps(axes: "Axes", label: str) -> None:
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel(label)
    labels = axes.get_legend_handles_labels()[1]
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns_of(labels),
        handlelength=2.8,
        columnspacing=1.4,
    )
