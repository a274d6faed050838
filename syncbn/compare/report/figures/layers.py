"""The figures from inside a network: quantiles of a unit, saturation, gradients and shift by layer.

Arms stand in panels on one scale, so that what is seen to differ does differ. Layers are ordered, so they have a
sequential colour scale from dark to light, which also works in grey.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.compare.report.figures.canvas import (
    HEIGHT,
    Picture,
    arm_styles,
    finish,
    legend_above,
    legend_strip,
    new_figure,
    panels,
    plain_log,
)
from syncbn.compare.report.figures.series import (
    Trials,
    by_arm,
    geometric_mean,
    layered,
    setting_of,
    shared_points,
)
from syncbn.compare.report.words.numbers import TIMES, number, percent
from syncbn.compare.report.words.study import arm_words, setting
from syncbn.compare.statistics import effects
from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.summary import Summary, among, arms_with, contrast, median_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUANTILES = ("quantile/15", "quantile/50", "quantile/85")
_MAP = "viridis"
MOST_LINES = 5
"""Layers that are drawn as lines; more become a map."""


def has_quantiles(summary: Summary, trials: Trials) -> bool:
    """Whether arms recorded quantiles."""
    return bool(by_arm(summary, trials, "quantile"))


def quantiles(summary: Summary, trials: Trials) -> Picture:
    """The 15, 50 and 85 % quantiles of one unit's input over the steps, a panel an arm."""
    arms = by_arm(summary, trials, "quantile")
    figure, axes, _ = panels(len(arms), 2, 2.1, shared="xy")
    for panel, (arm, style) in zip(axes, arm_styles(list(arms)).items(), strict=True):
        first = arms[arm][0]
        steps, low, middle, high = _quantiles_of(first)
        panel.fill_between(steps, low, high, color=style.colour, alpha=0.15, linewidth=0)
        panel.plot(steps, np.array([low, high]).T, color=style.colour, linewidth=1.1)
        panel.plot(steps, middle, color=style.colour, linewidth=2.2)
        panel.set_title(arm, loc="left", fontsize=12)
        _few_steps(panel)
    figure.supylabel("Input of the activation", fontsize=12)
    seed = next(iter(arms.values()))[0].seed
    caption = (
        f"{setting(summary)}. Unit 0 of the last hidden layer under seed {seed}, the first: median and the 15 and 85 % "
        f"quantiles over the probe images. The title speaks of all units and seeds: range over training, in units of "
        "the distance between the outer quantiles."
    )
    return finish(figure, "quantiles", _quantile_title(summary, trials), caption)


def _quantiles_of(trial: Any) -> tuple[Floats, Floats, Floats, Floats]:
    found = [shared_points([trial], metric) for metric in _QUANTILES]
    low, middle, high = (values[0] for _, values in found)
    return found[0][0], low, middle, high


def _few_steps(axes: "Axes") -> None:
    """Few ticks, as panels are narrow; no label where the ticks have none."""
    axes.locator_params(axis="x", nbins=4)
    if axes.xaxis.get_tick_params()["labelbottom"]:
        axes.set_xlabel("Optimiser step")


def _quantile_title(summary: Summary, trials: Trials) -> str:
    """How far the quantiles moved, in their own spread, by the finals where they are there."""
    arms = arms_with(summary, "quantile_range")
    if arms:
        found = {arm: median_of(summary, arm, "quantile_range") for arm in arms}
    else:
        own = by_arm(summary, trials, "quantile")
        found = {arm: float(np.median([_moved(t) for t in each])) for arm, each in own.items()}
    pair = among(contrast(summary, "quantile_range"), list(found))
    words = [f"{number(found[arm], 2)} spreads with {arm_words(arm)}" for arm in pair]
    return f"Over training the quantiles move by {', by '.join(words)}"


def _moved(trial: Any) -> float:
    """Mean range of the three quantiles of unit 0 over the mean distance of the outer two."""
    _, low, middle, high = _quantiles_of(trial)
    return float(np.mean([np.ptp(each) for each in (low, middle, high)]) / np.mean(high - low))


def has_saturation(summary: Summary, trials: Trials) -> bool:
    """Whether arms recorded saturation."""
    return bool(by_arm(summary, trials, "saturation"))


def saturation(summary: Summary, trials: Trials) -> Picture:
    """Share of saturated outputs of each layer over the steps, a panel an arm; maps where there are many layers."""
    arms = by_arm(summary, trials, "saturation")
    found = {arm: layered(own, "saturation") for arm, own in arms.items()}
    most = max((layers for layers, _, _ in found.values()), key=len)
    as_map = len(most) > MOST_LINES
    figure, axes, strip = panels(len(arms), 2, 1.9, legend=0 if as_map else 0.4, shared="x")
    label, mesh = f"{_noun(trials)} (%)", None
    for panel, (arm, (layers, steps, values)) in zip(axes, found.items(), strict=True):
        middle = 100 * np.median(values, axis=0)
        if as_map:
            mesh = _map(panel, steps, layers, middle, vmin=0, vmax=100)
        else:
            _layer_lines(panel, steps, layers, middle, most)
            panel.set(ylim=(-3, 103), ylabel=label)
        panel.set_title(arm, loc="left", fontsize=12)
        _few_steps(panel)
    if mesh is not None:
        figure.colorbar(mesh, ax=axes, label=label, shrink=0.8)
    else:
        legend_strip(strip, *axes[0].get_legend_handles_labels())
    caption = f"{setting(summary)}. Median over seeds. {_rule(trials)}"
    return finish(figure, "saturation", _saturation_title(summary, trials), caption)


def _layer_lines(
    axes: "Axes", steps: Floats, layers: list[int], values: Floats, most: list[int]
) -> None:
    """A line a layer, from dark to light; the same layer looks the same in every panel."""
    import matplotlib

    for layer, row in zip(layers, values, strict=True):
        place = most.index(layer)
        axes.plot(
            steps,
            row,
            marker="os^Dv"[place],
            markersize=5,
            markevery=max(1, len(steps) // 5),
            linestyle=("-", (0, (5, 2)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)))[place],
            color=matplotlib.colormaps[_MAP](0.9 * place / max(1, len(most) - 1)),
            label=f"layer {layer}",
        )


def _map(axes: "Axes", steps: Floats, layers: list[int], values: Floats, **scale: Any) -> Any:
    """Layers upwards, steps to the right, the value as a colour."""
    axes.grid(visible=False)
    mesh = axes.pcolormesh(
        _edges(steps), _edges(np.array(layers, float)), values, cmap=_MAP, **scale
    )
    axes.set_yticks(layers if len(layers) < 7 else layers[:: -(-len(layers) // 5)])
    axes.set_ylabel("Layer")
    return mesh


def _edges(centres: Floats) -> Floats:
    """Borders of cells around `centres`, half way between neighbours."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _activation(trials: Trials) -> str:
    return str(setting_of(trials[0], "model.activation"))


def _noun(trials: Trials) -> str:
    return "Units that are off" if _activation(trials) == "relu" else "Saturated outputs"


def _rule(trials: Trials) -> str:
    return {
        "relu": "A unit is off where it is 0 on every probe image.",
        "tanh": "Saturated: beyond 0.9 in size.",
    }.get(_activation(trials), "Saturated: outside 0.05 to 0.95.")


def _saturation_title(summary: Summary, trials: Trials) -> str:
    """The arm, layer and step with the largest share, and the most that any other arm has."""
    worst: dict[str, tuple[float, str]] = {}
    for arm, own in by_arm(summary, trials, "saturation").items():
        layers, steps, values = layered(own, "saturation")
        middle = np.median(values, axis=0)
        layer, look = np.unravel_index(int(np.nanargmax(middle)), middle.shape)
        worst[arm] = (float(middle[layer, look]), f"layer {layers[layer]}, step {steps[look]:.0f}")
    most, *others = sorted(worst, key=lambda arm: -worst[arm][0])
    share, where = worst[most]
    title = f"{_noun(trials)}, at most: {percent(share)} % with {arm_words(most)} ({where})"
    if not others:
        return title
    rest = f"{percent(worst[others[0]][0])} %"
    if len(others) == 1:
        return f"{title}, {rest} with {arm_words(others[0])}"
    return f"{title}, {rest} or less in the other {len(others)} arms"


def has_gradients(summary: Summary, trials: Trials) -> bool:
    """Whether arms recorded gradient norms."""
    return bool(by_arm(summary, trials, "grad_norm"))


def gradient_norms(summary: Summary, trials: Trials) -> Picture:
    """Gradient norms, layers by steps, a map an arm on one logarithmic scale of colours."""
    from matplotlib.colors import LogNorm

    arms = by_arm(summary, trials, "grad_norm")
    found = {arm: layered(own, "grad_norm") for arm, own in arms.items()}
    middles = {arm: geometric_mean(values, axis=0) for arm, (_, _, values) in found.items()}
    known = np.concatenate([each[np.isfinite(each)] for each in middles.values()])
    scale = LogNorm(max(known.min(), known.max() * 1e-8), known.max()) if len(known) else None
    figure, axes, _ = panels(len(arms), 2, 1.9, shared="x")
    mesh: Any = None
    for panel, (arm, (layers, steps, _)) in zip(axes, found.items(), strict=True):
        mesh = _map(panel, steps, layers, middles[arm], norm=scale)
        panel.set_title(arm, loc="left", fontsize=12)
        _few_steps(panel)
    figure.colorbar(mesh, ax=axes, label="Gradient norm (log scale)", shrink=0.9)
    caption = (
        f"{setting(summary)}. Norm of the loss's gradient by a layer's weights; the highest layer is the output's. "
        "Geometric mean over seeds; white: exactly 0, or not finite."
    )
    return finish(figure, "gradient_norms", _gradient_title(summary, trials), caption)


def _gradient_title(summary: Summary, trials: Trials) -> str:
    """How much larger the first layer's gradient is in one arm than in the other, over training."""
    arms = by_arm(summary, trials, "grad_norm")
    pair = among(contrast(summary, "grad_norm"), list(arms))
    means = [geometric_mean(shared_points(arms[arm], "grad_norm/1")[1]) for arm in pair]
    if len(pair) < 2 or len(means[0]) != len(means[1]):
        return f"Layer 1's gradient norm with {arm_words(pair[0])}: {number(float(np.median(means[0])))}"
    ratio = effects.effect(effects.paired_log_ratios(means[1].tolist(), means[0].tolist()))
    times = number(float(np.exp(ratio.median)))
    against, arm = map(arm_words, pair)
    return (
        f"Over training, layer 1's gradient is {times} times as large with {arm} as with {against}"
    )


def has_shift(summary: Summary, trials: Trials) -> bool:
    """Whether arms recorded the shift of their layers' inputs."""
    return bool(by_arm(summary, trials, "shift"))


def shift(summary: Summary, trials: Trials) -> Picture:
    """Mean shift between looks against the layer, a line an arm."""
    from matplotlib.ticker import MaxNLocator

    arms = by_arm(summary, trials, "shift")
    figure = new_figure(HEIGHT + 0.3)
    axes = figure.subplots()
    for arm, style in arm_styles(list(arms)).items():
        layers, _, values = layered(arms[arm], "shift")
        own = np.nanmean(values, axis=2)
        axes.plot(layers, own.T, color=style.colour, linewidth=0.6, alpha=0.4)
        middle = np.median(own, axis=0)
        drawn = {"marker": style.marker, "color": style.colour, "linestyle": style.line}
        axes.plot(layers, middle, label=arm, markersize=5, **drawn)
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
        found = effects.effect(_slopes(arms[arm]))
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
