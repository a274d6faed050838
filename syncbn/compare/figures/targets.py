"""Steps to a target error, a mark a seed.

The decision that shaped the file: a seed that never arrived is drawn hollow at its budget and counted in words. It
enters a median only as later than all others, and no mean at all: a mean over those that arrived flatters slow arms.
"""

from typing import TYPE_CHECKING

import numpy as np

from syncbn.compare import statistics
from syncbn.compare.canvas import Look, Picture, finish, looks
from syncbn.compare.captions import setting
from syncbn.compare.figures.dots import at_the_right, fit, rows_of, spread
from syncbn.compare.figures.series import Trials, budget_of
from syncbn.compare.reading import Summary, among, array_of, contrast, shown_arms, values_of
from syncbn.compare.statistics import Floats
from syncbn.compare.wording import TIMES, arm_words, number, value_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def has_steps(summary: Summary, trials: Trials) -> bool:
    """Whether steps to a target were counted."""
    return bool(trials) and any("steps_to_target" in own for own in summary["arms"].values())


def steps_to_target(summary: Summary, trials: Trials) -> Picture:
    """Steps that each seed took to the target; those that never arrived stand hollow at their budget."""
    arms = counted(summary)
    figure, axes = rows_of(arms)
    for row, (arm, look) in enumerate(looks(arms).items()):
        budget = budget_of([t for t in trials if t.arm == arm])
        _row_of_steps(axes, row, array_of(summary, arm, "steps_to_target"), budget, look)
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


def _row_of_steps(axes: "Axes", row: int, steps: Floats, budget: int, look: Look) -> None:
    there, heights = np.isfinite(steps), spread(row, len(steps))
    style = {"color": look.colour, "markersize": 7, "linestyle": ""}
    axes.plot(steps[there], heights[there], look.marker, alpha=0.75, **style)
    hollow = np.full((~there).sum(), budget)
    axes.plot(hollow, heights[~there], "o", markerfacecolor="white", markeredgewidth=1.5, **style)
    median = statistics.steps_to_target(np.where(there, steps, np.inf).tolist()).median
    if median is not None:
        axes.vlines(median, row - 0.36, row + 0.36, color=look.colour, linewidth=2.5)


def _arrivals(summary: Summary, arm: str) -> statistics.StepsToTarget:
    steps = array_of(summary, arm, "steps_to_target")
    return statistics.steps_to_target(np.where(np.isnan(steps), np.inf, steps).tolist())


def _reached_words(summary: Summary, arm: str) -> str:
    found = _arrivals(summary, arm)
    reached = f"{found.reached} of {found.total} reached"
    return reached if found.median is None else f"{found.median:.0f}\n{reached}"


def steps_title(summary: Summary) -> str:
    """Both medians, and their ratio where every seed arrived; how many did where half did not."""
    goal = summary["design"].get("target")
    target = "the target" if goal is None else f"{value_words('test_error', goal)} error"
    pair = among(contrast(summary, "steps_to_target"), counted(summary))
    found = {arm: _arrivals(summary, arm) for arm in pair}
    if len(pair) == 2 and all(each.reached == each.total for each in found.values()):
        logs = statistics.paired_log_ratios(
            *(array_of(summary, arm, "steps_to_target").tolist() for arm in reversed(pair))
        )
        ratio = number(float(np.exp(statistics.effect(logs).median)))
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
