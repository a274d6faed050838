"""The figures with a row an arm and a mark a seed: errors, times, errors in two modes, steps to a target.

Every seed is a mark, so that their number and their scatter show. Where a seed has no number, no median is drawn, and
the words at the right say how many are missing. A seed that never reached a target is drawn hollow at its budget and
counted in words; it enters a median only as later than all others, and no mean: a mean over the seeds that arrived
would flatter slow arms.
"""

from typing import TYPE_CHECKING

import numpy as np

from syncbn.compare.measure import decided_by, primary_of, shown
from syncbn.compare.report.figures.canvas import (
    SOFT,
    ArmStyle,
    Picture,
    arm_styles,
    finish,
    legend_above,
    new_figure,
    plain_log,
)
from syncbn.compare.report.figures.series import Trials, budget_of
from syncbn.compare.report.words.numbers import NOTHING, TIMES, number, value_words
from syncbn.compare.report.words.study import (
    arm_first,
    arm_words,
    axis_label,
    contrast_title,
    goal_words,
    setting,
)
from syncbn.compare.report.words.text import listed
from syncbn.compare.statistics import effects
from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.summary import (
    Summary,
    among,
    arms_with,
    array_of,
    base_of,
    contrast,
    is_grid,
    median_of,
    shown_arms,
    values_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "A mark a seed; the bar, and the number at the right: the median."


def has_errors(summary: Summary, _: Trials) -> bool:
    """Whether arms have the measure that decides."""
    return bool(arms_with(summary, decided_by(summary).name))


def error_by_arm(summary: Summary, _: Trials) -> Picture:
    """Each arm's test errors at the end, or what the task decides by."""
    metric = decided_by(summary).name
    lost = [arm for arm in shown_arms(summary) if arm not in arms_with(summary, metric)]
    absent = f" Without a number in any seed: {', '.join(lost)}." if lost else ""
    caption = f"{setting(summary)}. {_MARKS}{absent}"
    name = f"{metric.removeprefix('test_')}_by_arm"
    return _dots_by_arm(summary, metric, name, contrast_title(summary, metric), caption)


_DRAWN_OTHERWISE = (
    "seconds",
    "steps_to_target",
    "cells_trained",
    "shift_slope",
    "leak_gap",
    "step_ms",
    "exchange_ms",
    "loss_range",
    "gradient_predictiveness",
    "effective_beta",
    "saturation",
    "grad_norm",
    "shift",
)
"""Metrics that have a figure of their own, beside the one that the task decides by."""


def has_primary(summary: Summary, _: Trials) -> bool:
    """Whether the study is about a metric that no other figure shows."""
    metric = primary_of(summary)
    own = base_of(metric) in (decided_by(summary).name, *_DRAWN_OTHERWISE) or metric.startswith(
        "oracle_gap"
    )
    return not own and bool(arms_with(summary, metric))


def primary_by_arm(summary: Summary, _: Trials) -> Picture:
    """Each arm's values of what the study is about."""
    metric = primary_of(summary)
    caption = f"{setting(summary)}. {_MARKS}"
    return _dots_by_arm(summary, metric, "primary_by_arm", contrast_title(summary, metric), caption)


def has_seconds(summary: Summary, _: Trials) -> bool:
    """Whether trials were timed on ranks of their own: one process for all of them pays nothing for synchronising."""
    virtual = summary["design"].get("virtual")
    return not virtual and not is_grid(summary) and bool(arms_with(summary, "seconds"))


def seconds(summary: Summary, _: Trials) -> Picture:
    """Each arm's wall times."""
    caption = f"{setting(summary)}. Training a trial. {_MARKS}"
    return _dots_by_arm(summary, "seconds", "seconds", _seconds_title(summary), caption)


def _seconds_title(summary: Summary) -> str:
    against, arm = (among(contrast(summary), arms_with(summary, "seconds")) * 2)[:2]
    logs = effects.paired_log_ratios(
        *(array_of(summary, name, "seconds").tolist() for name in (arm, against))
    )
    ratio = effects.effect(logs)
    one, other = arm_first(arm), arm_words(against)
    if np.isnan(ratio.median):
        return f"{one} or {other} has trials that diverged before they could be timed"
    low, middle, high = np.exp([ratio.interval.low, ratio.median, ratio.interval.high])
    interval = f" (95 % interval {number(low)} to {number(high)})" if np.isfinite(high) else ""
    return f"{one} takes {number(middle)} times as long as {other}{interval}"


def _dots_by_arm(summary: Summary, metric: str, name: str, title: str, caption: str) -> Picture:
    """A row an arm with each seed's value of `metric`, in percent where it is a share."""
    arms = arms_with(summary, metric)
    figure, axes = rows_of(arms)
    for row, (arm, style) in enumerate(arm_styles(arms).items()):
        values = array_of(summary, arm, metric)
        _row_of_dots(axes, row, shown(summary, metric).factor * values, style)
        at_the_right(axes, row, _words_of(summary, arm, metric))
    axes.set_xlabel(axis_label(summary, metric))
    fit(axes)
    return finish(figure, name, title, caption)


def _words_of(summary: Summary, arm: str, metric: str) -> str:
    """The arm's median, or how many seeds have none."""
    median, values = median_of(summary, arm, metric), array_of(summary, arm, metric)
    if median is None:
        return f"{NOTHING} ({int(np.isnan(values).sum())} of {len(values)} censored)"
    return value_words(shown(summary, metric), median)


def rows_of(arms: list[str]) -> tuple["Figure", "Axes"]:
    """An empty figure with a named row an arm; names alone where there are many."""
    many = len(arms) > 7
    figure = new_figure(1.9 + (0.36 if many else 0.55) * len(arms))
    axes = figure.subplots()
    axes.set_yticks(range(len(arms)), [arm if many else _two_lines(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _two_lines(arm: str) -> str:
    """The arm's name, and under it what it means where that is known."""
    words = arm_words(arm)
    return arm if words == arm else f"{arm}\n{words}"


def at_the_right(axes: "Axes", row: float, words: str) -> None:
    """`words` outside the axes, beside a row."""
    axes.annotate(words, (1.01, row), xycoords=axes.get_yaxis_transform(), va="center")


def _row_of_dots(axes: "Axes", row: int, values: Floats, style: ArmStyle) -> None:
    axes.plot(values, spread(row, len(values)), style.marker, color=style.colour, alpha=0.75, ms=7)
    axes.vlines(np.median(values), row - 0.36, row + 0.36, color=style.colour, linewidth=2.5)


def spread(row: float, num: int) -> Floats:
    """Heights of a row's marks, so that equal ones do not hide each other."""
    return row + np.linspace(-0.2, 0.2, num) * (num > 1)


def fit(axes: "Axes") -> None:
    """Limits of the values' axis: from 0 unless that leaves most of it empty; logarithmic where they span a lot."""
    drawn = np.concatenate([np.asarray(line.get_xdata(), float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return
    low, high = drawn.min(), drawn.max()
    if low > 0 and high > 10 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
        plain_log(axes.xaxis)
        axes.set_xlabel(f"{axes.get_xlabel()}, log scale")
    elif 0 <= low < 0.6 * high:
        axes.set_xlim(0, 1.05 * high)


_MODES = ("train_mode_error", "eval_mode_error")


def has_modes(summary: Summary, _: Trials) -> bool:
    """Whether errors in training and evaluation mode were measured."""
    return bool(arms_with(summary, *_MODES))


def leak(summary: Summary, _: Trials) -> Picture:
    """Error in training mode (hollow) and in evaluation mode (filled), a line a seed between them."""
    arms = arms_with(summary, *_MODES)
    figure, axes = rows_of(arms)
    for row, (arm, style) in enumerate(arm_styles(arms).items()):
        training, evaluation = (100 * array_of(summary, arm, mode) for mode in _MODES)
        heights = spread(row, len(training))
        axes.hlines(heights, training, evaluation, color=style.colour, alpha=0.5, linewidth=1.2)
        axes.plot(training, heights, "o", color=style.colour, markerfacecolor="white", ms=7)
        axes.plot(evaluation, heights, "o", color=style.colour, ms=7)
        at_the_right(axes, row, _mode_words(summary, arm))
    for face, mode in (("white", "training mode"), (SOFT, "evaluation mode")):
        axes.plot([], [], "o", color=SOFT, markerfacecolor=face, label=mode)
    legend_above(axes)
    axes.set_xlabel("Error on training samples (%)")
    fit(axes)
    pair = among(contrast(summary, "leak_gap"), arms)
    words = [f"{arm_words(arm)} {_mode_words(summary, arm)}" for arm in pair]
    title = f"Error in training mode, then in evaluation mode: {listed(words)}"
    caption = (
        f"{setting(summary)}. The same batches, dealt to ranks as in training; hollow: normalised by their own "
        "statistics, as in training; filled: by running statistics. A line a seed."
    )
    return finish(figure, "leak", title, caption)


def _mode_words(summary: Summary, arm: str) -> str:
    one, other = (median_of(summary, arm, mode) for mode in _MODES)
    arrow = "\N{RIGHTWARDS ARROW}"
    return (
        f"{value_words(_MODES[0], one).removesuffix(' %')} {arrow} {value_words(_MODES[1], other)}"
    )


def has_steps(summary: Summary, trials: Trials) -> bool:
    """Whether steps to a target were counted."""
    return bool(trials) and any("steps_to_target" in own for own in summary["arms"].values())


def steps_to_target(summary: Summary, trials: Trials) -> Picture:
    """Steps that each seed took to the target; those that never arrived stand hollow at their budget."""
    arms = counted(summary)
    figure, axes = rows_of(arms)
    for row, (arm, style) in enumerate(arm_styles(arms).items()):
        budget = budget_of([t for t in trials if t.arm == arm])
        _row_of_steps(axes, row, array_of(summary, arm, "steps_to_target"), budget, style)
        at_the_right(axes, row, _reached_words(summary, arm))
    axes.set_xlabel("Optimiser steps to the target")
    fit(axes)
    caption = (
        f"{setting(summary)}. A mark a seed, a bar at the median. Hollow: not there when its budget ended (censored); "
        "no mean is taken over those."
    )
    return finish(figure, "steps_to_target", steps_title(summary), caption)


def counted(summary: Summary) -> list[str]:
    """The arms whose steps to the target were counted, whether any seed arrived or not."""
    return [arm for arm in shown_arms(summary) if values_of(summary, arm, "steps_to_target")]


def _row_of_steps(axes: "Axes", row: int, steps: Floats, budget: int, style: ArmStyle) -> None:
    there, heights = np.isfinite(steps), spread(row, len(steps))
    drawn = {"color": style.colour, "markersize": 7, "linestyle": ""}
    axes.plot(steps[there], heights[there], style.marker, alpha=0.75, **drawn)
    hollow = np.full((~there).sum(), budget)
    axes.plot(hollow, heights[~there], "o", markerfacecolor="white", markeredgewidth=1.5, **drawn)
    median = effects.steps_to_target(np.where(there, steps, np.inf).tolist()).median
    if median is not None:
        axes.vlines(median, row - 0.36, row + 0.36, color=style.colour, linewidth=2.5)


def arrivals(summary: Summary, arm: str) -> effects.StepsToTarget:
    """How many of the arm's seeds reached the target, and their median step."""
    steps = array_of(summary, arm, "steps_to_target")
    return effects.steps_to_target(np.where(np.isnan(steps), np.inf, steps).tolist())


def _reached_words(summary: Summary, arm: str) -> str:
    found = arrivals(summary, arm)
    reached = f"{found.reached} of {found.total} reached"
    return reached if found.median is None else f"{found.median:.0f}\n{reached}"


def steps_title(summary: Summary) -> str:
    """Both medians, and their ratio where every seed arrived; how many did where half did not."""
    goal = summary["design"].get("target")
    target = "the target" if goal is None else goal_words(decided_by(summary), goal)
    pair = among(contrast(summary, "steps_to_target"), counted(summary))
    found = {arm: arrivals(summary, arm) for arm in pair}
    if len(pair) == 2 and all(each.reached == each.total for each in found.values()):
        logs = effects.paired_log_ratios(
            *(array_of(summary, arm, "steps_to_target").tolist() for arm in reversed(pair))
        )
        ratio = number(float(np.exp(effects.effect(logs).median)))
        words = [f"{found[arm].median:.0f} with {arm_words(arm)}" for arm in pair]
        return f"Steps to {target}: {', '.join(words)} (median ratio {TIMES}{ratio})"
    if all(each.median is not None for each in found.values()):
        words = [
            f"{each.median:.0f} with {arm_words(arm)} ({each.reached} of {each.total} seeds)"
            for arm, each in found.items()
        ]
        return f"Median steps to {target}: {', '.join(words)}"
    words = [f"{found[arm].reached} of {found[arm].total} with {arm_words(arm)}" for arm in pair]
    return f"Seeds that get to {target}: {', '.join(words)}"
