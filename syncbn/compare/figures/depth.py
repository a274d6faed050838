"""How the shift of a layer's inputs runs with its depth.

The decision that shaped the file: the axis is the layer, not the step, because the statement is on depth; over the
steps a mean is taken.
"""

from typing import Any

import numpy as np

from syncbn.compare import statistics
from syncbn.compare.canvas import (
    HEIGHT,
    Picture,
    finish,
    legend_above,
    looks,
    new_figure,
    plain_log,
)
from syncbn.compare.captions import setting
from syncbn.compare.figures.series import Trials, by_arm, layered
from syncbn.compare.reading import Summary, among, contrast
from syncbn.compare.statistics import Floats
from syncbn.compare.wording import TIMES, arm_words, number


def has_shift(summary: Summary, trials: Trials) -> bool:
    """Whether arms recorded the shift of their layers' inputs."""
    return bool(by_arm(summary, trials, "shift"))


def shift(summary: Summary, trials: Trials) -> Picture:
    """Mean shift between looks against the layer, a line an arm."""
    from matplotlib.ticker import MaxNLocator

    arms = by_arm(summary, trials, "shift")
    figure = new_figure(HEIGHT + 0.3)
    axes = figure.subplots()
    for arm, look in looks(list(arms)).items():
        layers, _, values = layered(arms[arm], "shift")
        own = np.nanmean(values, axis=2)
        axes.plot(layers, own.T, color=look.colour, linewidth=0.6, alpha=0.4)
        middle = np.median(own, axis=0)
        style = {"marker": look.marker, "color": look.colour, "linestyle": look.line}
        axes.plot(layers, middle, label=arm, markersize=5, **style)
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="Layer (1: nearest the images)", ylabel="Shift between looks, in spreads (log)")
    legend_above(axes)
    caption = (
        f"{setting(summary)}. Distance that a layer's mean input moves from one look to the next, in standard "
        "deviations a unit, mean over the looks. Thick: median over seeds; thin: a seed."
    )
    return finish(figure, "shift", _shift_title(summary, trials), caption)


def _shift_title(summary: Summary, trials: Trials) -> str:
    """The factor from layer to layer, with its interval."""
    arms = by_arm(summary, trials, "shift")
    words = []
    for arm in among(contrast(summary, "shift_slope"), list(arms)):
        found = statistics.effect(_slopes(arms[arm]))
        low, middle, high = np.exp([found.interval.low, found.median, found.interval.high])
        bounds = f" ({number(low)} to {number(high)})" if np.isfinite(high) else ""
        words.append(f"{TIMES}{number(middle)}{bounds} with {arm_words(arm)}")
    return f"From layer to layer the shift changes by {', '.join(words)}"


def _slopes(trials: Trials) -> Floats:
    """Slope of the logarithm of the shift against the layer, of each trial: recorded, or by least squares."""
    return np.array(
        [t.final["shift_slope"] if "shift_slope" in t.final else _slope(t) for t in trials]
    )


def _slope(trial: Any) -> float:
    layers, _, values = layered([trial], "shift")
    means = np.nanmean(values[0], axis=1)
    if not (means > 0).all():
        return float("nan")
    return float(np.polyfit(layers, np.log(means), 1)[0])
