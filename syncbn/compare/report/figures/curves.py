"""The figures over the steps: test error and training loss, arm by arm.

Up to six arms have a median, its band and each seed's own line; more than six have medians alone, because sixty thin
lines cannot be read.
"""

from typing import TYPE_CHECKING

import numpy as np

from syncbn.compare.measure import decided_by
from syncbn.compare.report.figures.canvas import (
    HEIGHT,
    ArmStyle,
    Picture,
    arm_styles,
    finish,
    legend_above,
    legend_height,
    new_figure,
    plain_log,
)
from syncbn.compare.report.figures.series import Trials, by_arm, shared_points, smooth
from syncbn.compare.report.words.numbers import number, value_words
from syncbn.compare.report.words.study import (
    arm_first,
    arm_words,
    axis_label,
    contrast_title,
    goal_words,
    setting,
)
from syncbn.compare.statistics import effects
from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.summary import Summary, among, contrast, median_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_WITH_SEEDS = 6
"""Arms in one figure that are drawn with their seeds."""


def reading(num_arms: int) -> str:
    """How the lines of a figure with so many arms are read."""
    if num_arms > MOST_WITH_SEEDS:
        return "A line: median over the seeds, its end in the legend."
    return "Thick: median, its end in the legend; band: middle 95 % of the seeds; thin: a seed."


def draw_lines(
    axes: "Axes",
    steps: Floats,
    values: Floats,
    style: ArmStyle,
    label: str,
    *,
    few: bool,
    marked: bool,
) -> None:
    """Median of `values`, (seeds, steps); where `few` arms share the axes also the band and each seed's line."""
    low, middle, high = effects.band(values)
    if few and len(values) > 1:
        axes.plot(steps, values.T, color=style.colour, linewidth=0.6, alpha=0.35)
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.12, linewidth=0)
    every = max(1, len(steps) // 12)
    axes.plot(
        steps,
        middle,
        marker=style.marker if marked else "",
        markevery=every,
        linestyle=style.line,
        color=style.colour,
        label=label,
    )


def can_converge(summary: Summary, trials: Trials) -> bool:
    """Whether some arm was evaluated more than once."""
    metric = decided_by(summary).name
    own = by_arm(summary, trials, metric).values()
    return any(len(shared_points(each, metric)[0]) > 1 for each in own)


def convergence(summary: Summary, trials: Trials) -> Picture:
    """Test error, or what else the task decides by, over the steps."""
    decides = decided_by(summary)
    metric = decides.name
    arms = by_arm(summary, trials, metric)
    few = len(arms) <= MOST_WITH_SEEDS
    words = {arm: f"{arm} {value_words(decides, median_of(summary, arm, metric))}" for arm in arms}
    figure = new_figure(HEIGHT + 0.3 + legend_height(list(words.values())))
    axes = figure.subplots()
    for arm, style in arm_styles(list(arms)).items():
        steps, values = shared_points(arms[arm], metric)
        draw_lines(axes, steps, decides.factor * values, style, words[arm], few=few, marked=True)
    _over_steps(axes, axis_label(summary, metric))
    _scale_of_errors(axes)
    caption = f"{setting(summary)}. {reading(len(arms))}"
    return finish(figure, "convergence", _convergence_title(summary, trials), caption)


def _scale_of_errors(axes: "Axes") -> None:
    """A logarithmic axis where the smallest value would vanish beside the largest, else one from 0."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if (drawn < 0).any():
        return
    drawn = drawn[drawn > 0]
    if len(drawn) and drawn.max() > 5 * drawn.min():
        axes.set_yscale("log")
        axes.set_ylim(drawn.min() / 1.15, drawn.max() * 1.15)
        plain_log(axes.yaxis)
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
    else:
        axes.set_ylim(bottom=0)


def _convergence_title(summary: Summary, trials: Trials) -> str:
    """When one arm was as good as the other ever got, or where both ended."""
    decides = decided_by(summary)
    arms = by_arm(summary, trials, decides.name)
    against, arm = (among(contrast(summary, decides.name), list(arms)) * 2)[:2]
    goal = median_of(summary, against, decides.name)
    steps, values = shared_points(arms[arm], decides.name)
    if goal is None or len(steps) < 2 or against == arm:
        return contrast_title(summary, decides.name)
    there = steps[decides.better(np.median(values, axis=0), goal)]
    of, last = f"final {goal_words(decides, goal)}", f"{steps[-1]:.0f}"
    if not len(there):
        words = f"does not get to {arm_words(against)}'s {of} in {last} steps"
        return f"{arm_first(arm)} {words}"
    words = f"is at {arm_words(against)}'s {of} by step {there[0]:.0f} of {last}"
    return f"{arm_first(arm)} {words}"


def has_losses(_: Summary, trials: Trials) -> bool:
    """Whether some trial recorded training losses that a log scale can show."""
    losses = (trial.points.get("train_loss", {}).values() for trial in trials)
    return any(sum(0 < loss < np.inf for loss in own) > 1 for own in losses)


def training_loss(summary: Summary, trials: Trials) -> Picture:
    """Smoothed training loss over the steps."""
    arms = by_arm(summary, trials, "train_loss")
    few = len(arms) <= MOST_WITH_SEEDS
    figure = new_figure(HEIGHT + 0.3 + legend_height([f"{arm} 0.00" for arm in arms]))
    axes = figure.subplots()
    ends: dict[str, float] = {}
    for arm, style in arm_styles(list(arms)).items():
        steps, values = shared_points(arms[arm], "train_loss")
        smoothed = smooth(values, max(1, len(steps) // 15))
        ends[arm] = float(np.median(smoothed[:, -1])) if len(steps) else np.nan
        label = f"{arm} {number(ends[arm], 2)}"
        draw_lines(axes, steps, smoothed, style, label, few=few, marked=False)
    _over_steps(axes, "Training loss (log scale)")
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    pair = among(contrast(summary), list(ends))
    losses = [f"{number(ends[name], 2)} with {arm_words(name)}" for name in pair]
    title = f"Training loss ends at {', at '.join(losses)}"
    caption = (
        f"{setting(summary)}. Running mean over a fifteenth of the steps. {reading(len(arms))}"
    )
    return finish(figure, "training_loss", title, caption)


def _over_steps(axes: "Axes", label: str) -> None:
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel(label)
    legend_above(axes)
