"""Figures of several quantities over the steps, one panel each: gaps to one process, smoothness along the gradient.

Each quantity has its own logarithmic axis, because they differ by powers of ten and in unit; every panel has all arms.
"""

from typing import TYPE_CHECKING

import numpy as np

from syncbn.compare.measure import measure
from syncbn.compare.report.figures.canvas import (
    ArmStyle,
    Picture,
    arm_styles,
    finish,
    legend_strip,
    panels,
    plain_log,
    strip_height,
)
from syncbn.compare.report.figures.curves import MOST_WITH_SEEDS
from syncbn.compare.report.figures.series import Trials, by_arm, geometric_mean, shared_points
from syncbn.compare.report.words.numbers import number
from syncbn.compare.report.words.study import arm_words, setting
from syncbn.compare.statistics import effects
from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.summary import Summary, among, base_of, contrast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAPS = ("oracle_gap_loss", "oracle_gap_gradient", "oracle_gap_buffers", "oracle_gap_weights")
_SMOOTHNESS = ("loss_range", "gradient_predictiveness", "effective_beta")
_LABELS = {
    "oracle_gap_loss": "Loss",
    "oracle_gap_gradient": "Gradient",
    "oracle_gap_buffers": "Running statistics",
    "oracle_gap_weights": "Weights",
    "loss_range": "Range of the loss",
    "gradient_predictiveness": "Change of the gradient",
    "effective_beta": "Effective beta",
}
_NOTHING_BELOW = 1e-17
"""Relative gaps below are drawn here: float64 resolves 1e-16."""


def _known(summary: Summary, trials: Trials, metrics: tuple[str, ...]) -> list[str]:
    return [metric for metric in metrics if by_arm(summary, trials, metric)]


def has_gaps(summary: Summary, trials: Trials) -> bool:
    """Whether arms were compared with one process along the way."""
    return bool(_known(summary, trials, _GAPS))


def equivalence(summary: Summary, trials: Trials) -> Picture:
    """Relative gap to one process over the steps, a panel a quantity."""
    metrics = _known(summary, trials, _GAPS)
    arms = list(by_arm(summary, trials, metrics[0]))
    figure, axes, strip = panels(len(metrics), 2, 2.1, legend=strip_height(arms), shared="xy")
    for panel, metric in zip(axes, metrics, strict=True):
        _panel(panel, summary, trials, metric, floor=_NOTHING_BELOW)
        _outer(panel, "Relative gap (log)")
    legend_strip(strip, *axes[0].get_legend_handles_labels())
    caption = (
        f"{setting(summary)}. Difference between the ranks and one process that takes the whole batch by the "
        "textbook's formula, relative to its size. Median over seeds; what is exactly 0, or below "
        f"{_NOTHING_BELOW:g}, is drawn there."
    )
    return finish(figure, "equivalence", _gap_title(summary, trials, metrics), caption)


def _gap_title(summary: Summary, trials: Trials, metrics: list[str]) -> str:
    """The largest gap of each arm over seeds, looks and quantities: the exact ones together, the others by name."""
    worst = {
        arm: max(_largest(own, metric) for metric in metrics)
        for arm, own in by_arm(summary, trials, metrics[0]).items()
    }
    exact = {arm: gap for arm, gap in worst.items() if gap < 1e-7}
    others = [f"{arm} {number(gap, 2)}" for arm, gap in worst.items() if arm not in exact]
    words = []
    if exact:
        words = [f"at most {number(max(exact.values()), 2)} with {', '.join(exact)}"]
    return f"Largest gap to one process: {'; '.join([*words, *others])}"


def _largest(trials: Trials, metric: str) -> float:
    values = shared_points(trials, metric)[1]
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def has_smoothness(summary: Summary, trials: Trials) -> bool:
    """Whether the landscape was probed along the gradient."""
    return bool(_known(summary, trials, _SMOOTHNESS))


def smoothness(summary: Summary, trials: Trials) -> Picture:
    """Loss range, change of the gradient and effective beta over the steps."""
    metrics = _known(summary, trials, _SMOOTHNESS)
    arms = list(by_arm(summary, trials, metrics[0]))
    figure, axes, strip = panels(len(metrics), 1, 1.75, legend=strip_height(arms), shared="x")
    for panel, metric in zip(axes, metrics, strict=True):
        _panel(panel, summary, trials, metric, floor=0.0)
        _outer(panel, "log scale")
    legend_strip(strip, *axes[0].get_legend_handles_labels())
    caption = (
        f"{setting(summary)}. Along the gradient, over steps of 0.5 to 4 learning rates (Santurkar et al. 2018). "
        "Thick: median over seeds; thin: a seed. The title compares geometric means over the looks."
    )
    return finish(figure, "smoothness", _smoothness_title(summary, trials, metrics), caption)


def _panel(axes: "Axes", summary: Summary, trials: Trials, metric: str, floor: float) -> None:
    """Every arm's curve of `metric`, on a logarithmic axis."""
    arms = by_arm(summary, trials, metric)
    for arm, style in arm_styles(list(arms)).items():
        steps, values = shared_points(arms[arm], metric)
        _curve(axes, steps, np.maximum(values, floor), style, arm, len(arms) <= MOST_WITH_SEEDS)
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_title(_LABELS[metric], loc="left", fontsize=12)


def _curve(
    axes: "Axes", steps: Floats, values: Floats, style: ArmStyle, label: str, few: bool
) -> None:
    drawn = {"color": style.colour, "linestyle": style.line, "marker": style.marker}
    if few:
        axes.plot(steps, values.T, color=style.colour, linewidth=0.5, alpha=0.35)
    middle, every = np.median(values, axis=0), max(1, len(steps) // 8)
    axes.plot(steps, middle, label=label, markevery=every, markersize=5, linewidth=1.6, **drawn)


def _outer(axes: "Axes", label: str) -> None:
    """Labels of the axes where their ticks have some."""
    if axes.xaxis.get_tick_params()["labelbottom"]:
        axes.set_xlabel("Optimiser step")
    if axes.yaxis.get_tick_params()["labelleft"]:
        axes.set_ylabel(label)


def _smoothness_title(summary: Summary, trials: Trials, metrics: list[str]) -> str:
    """The ratio of the first quantity's geometric means over the looks, with its interval."""
    about = base_of(summary["design"].get("primary_metric") or "")
    metric = about if about in metrics else metrics[0]
    arms = by_arm(summary, trials, metric)
    pair = among(contrast(summary, metric), list(arms))
    means = [geometric_mean(shared_points(arms[arm], metric)[1]) for arm in pair]
    words = measure(metric).words
    if len(pair) < 2 or len(means[0]) != len(means[1]):
        return f"The {words} with {arm_words(pair[0])}: {number(float(np.median(means[0])))}"
    found = effects.effect(effects.paired_log_ratios(means[1].tolist(), means[0].tolist()))
    low, middle, high = np.exp([found.interval.low, found.median, found.interval.high])
    bounds = f" (95 % interval {number(low)} to {number(high)})" if np.isfinite(high) else ""
    against, arm = map(arm_words, pair)
    return f"With {arm} the {words} is {number(middle)} times that with {against}{bounds}"
