"""What synchronising costs: the time of a step by arm, and the time in exchanges by layer.

Waiting is drawn as a part of its step, so its share is visible; the rows below show which layers it is spent in.
"""

from typing import TYPE_CHECKING

import numpy as np

from syncbn.compare.report.figures.canvas import Picture, arm_styles, finish, new_figure
from syncbn.compare.report.figures.dots import at_the_right, spread
from syncbn.compare.report.figures.series import Trials
from syncbn.compare.report.words.numbers import byte_words, number, percent, value_words
from syncbn.compare.report.words.study import arm_words, setting
from syncbn.compare.report.words.text import capital
from syncbn.compare.statistics import effects
from syncbn.compare.study.summary import (
    Summary,
    among,
    arms_with,
    array_of,
    contrast,
    is_grid,
    median_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = 20
"""Layers with a row of their own; the cheaper ones share the last row."""


def has_costs(summary: Summary, _: Trials) -> bool:
    """Whether steps were timed."""
    return not is_grid(summary) and bool(arms_with(summary, "step_ms"))


def cost(summary: Summary, _: Trials) -> Picture:
    """Time of a step by arm with its part in exchanges, and below that part by layer."""
    arms = arms_with(summary, "step_ms")
    layers = layer_costs(summary)
    rows = len(next(iter(layers.values()))) if layers else 0
    heights = [0.9 + 0.5 * len(arms), *([1.0 + 0.26 * rows] if rows else [])]
    figure = new_figure(1.3 + sum(heights))
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    _steps(axes[0], summary, arms)
    if rows:
        _by_layer(axes[1], summary, layers)
    caption = (
        f"{setting(summary)}. Medians over seeds; a mark a seed. Hatched: in exchanges, moving and waiting. Times hold "
        "on this machine alone."
    )
    return finish(figure, "cost", _title(summary, arms), caption)


def _steps(axes: "Axes", summary: Summary, arms: list[str]) -> None:
    for row, (arm, style) in enumerate(arm_styles(arms).items()):
        whole = median_of(summary, arm, "step_ms") or np.nan
        waiting = median_of(summary, arm, "exchange_ms") or 0.0
        axes.barh(row, whole - waiting, 0.6, color=style.colour)
        hatched = axes.barh(row, waiting, 0.6, whole - waiting, color="white", hatch="////")
        for bar in hatched:
            bar.set_edgecolor(style.colour)
        own = array_of(summary, arm, "step_ms")
        axes.plot(own, spread(row, len(own)), style.marker, color="black", markersize=4, alpha=0.6)
        at_the_right(axes, row, _step_words(summary, arm))
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("Time of a step (ms)")


def _step_words(summary: Summary, arm: str) -> str:
    words = value_words("step_ms", median_of(summary, arm, "step_ms"))
    sent = median_of(summary, arm, "exchange_bytes")
    return f"{words}\n{byte_words(sent)} sent" if sent else words


def layer_costs(summary: Summary) -> dict[str, dict[str, float]]:
    """Arm to layer to median ms in exchanges, in the network's order; the cheap layers summed where there are many."""
    found: dict[str, dict[str, float]] = {}
    for arm in summary["arms"]:
        names = [m for m in summary["arms"][arm] if m.startswith("exchange_ms/")]
        own = {m.partition("/")[2]: median_of(summary, arm, m) for m in names}
        if any(own.values()):
            found[arm] = {layer: ms or 0.0 for layer, ms in own.items()}
    layers = list(dict.fromkeys(layer for own in found.values() for layer in own))
    if len(layers) <= MOST_LAYERS:
        return {arm: {layer: own.get(layer, 0.0) for layer in layers} for arm, own in found.items()}
    total = {layer: sum(own.get(layer, 0.0) for own in found.values()) for layer in layers}
    dear = set(sorted(layers, key=total.__getitem__, reverse=True)[: MOST_LAYERS - 1])
    others = f"the other {len(layers) - len(dear)}"
    return {
        arm: {layer: own.get(layer, 0.0) for layer in layers if layer in dear}
        | {others: sum(own.get(layer, 0.0) for layer in layers if layer not in dear)}
        for arm, own in found.items()
    }


def _by_layer(axes: "Axes", summary: Summary, layers: dict[str, dict[str, float]]) -> None:
    """A row a layer, a mark an arm."""
    given = arm_styles(arms_with(summary, "step_ms"))
    names = list(next(iter(layers.values())))
    for arm, own in layers.items():
        style = given[arm]
        rows = range(len(names))
        axes.hlines(rows, 0, list(own.values()), color=style.colour, alpha=0.4, linewidth=1.5)
        axes.plot(list(own.values()), rows, style.marker, color=style.colour, label=arm)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    only = f" with {next(iter(layers))}" if len(layers) == 1 else ""
    axes.set_xlabel(f"Time in exchanges a step{only}, by layer (ms)")
    if not only:
        axes.legend(loc="lower right")


def _title(summary: Summary, arms: list[str]) -> str:
    """How much longer a step takes, and the share spent in exchanges."""
    against, arm = (among(contrast(summary, "step_ms"), arms) * 2)[:2]
    logs = effects.paired_log_ratios(
        *(array_of(summary, name, "step_ms").tolist() for name in (arm, against))
    )
    ratio = effects.effect(logs)
    times = number(float(np.exp(ratio.median)))
    words = f"A step takes {times} times as long with {arm_words(arm)} as with {arm_words(against)}"
    share = median_of(summary, arm, "exchange_share")
    return capital(words) + (f"; {percent(share)} % of it in exchanges" if share else "")
