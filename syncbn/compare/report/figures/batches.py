"""What the task decides by against the number of samples that share batch statistics, with published curves apart.

Local, grouped and synchronised batch norm are one curve, because they differ only in how many ranks share statistics.
Published curves have axes of their own, because their networks differ.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.compare.measure import decided_by, shown
from syncbn.compare.report.figures.canvas import (
    SOFT,
    ArmStyle,
    Picture,
    arm_styles,
    finish,
    new_figure,
    plain_log,
)
from syncbn.compare.report.figures.series import Trials, setting_of
from syncbn.compare.report.words.numbers import value_words
from syncbn.compare.report.words.study import axis_label, setting, split_words
from syncbn.compare.report.words.text import capital
from syncbn.compare.study.summary import Summary, arms_with, array_of, is_grid, median_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[int, str]]
"""Samples that share statistics, and the arm where they do, in ascending order."""

_SHARED = ("local", "sync_group", "sync", "torch_sync")
"""Norms that differ in how many ranks share statistics alone."""
_STATISTICS = {
    "test_error_running": ArmStyle("#0072b2", "o", "-"),
    "test_error_precise": ArmStyle("#e69f00", "s", (0, (5, 2))),
    "test_error_batch": ArmStyle("#009e73", "^", (0, (1, 1))),
}


def curves_of(summary: Summary, trials: Trials) -> dict[str, Curve]:
    """What can be joined: `shared` for batch norm over more and more ranks, and each other norm by its name."""
    batches = summary["design"].get("normalisation_batch") or {}
    norms = {trial.arm: setting_of(trial, "norm.name") for trial in trials}
    curves: dict[str, Curve] = {}
    for arm in arms_with(summary, decided_by(summary).name):
        if batches.get(arm):
            name = "shared" if norms.get(arm) in _SHARED else str(norms.get(arm))
            curves.setdefault(name, []).append((int(batches[arm]), arm))
    return {name: sorted(curve) for name, curve in curves.items()}


def has_batches(summary: Summary, trials: Trials) -> bool:
    """Whether one kind of norm was run at three sizes of its batch or more, one arm a size."""
    if is_grid(summary):
        return False
    curve = main_curve(summary, trials)
    sizes = [size for size, _ in curve]
    return len(set(sizes)) > 2 and len(set(sizes)) == len(sizes)


def main_curve(summary: Summary, trials: Trials) -> Curve:
    """The curve with the most arms."""
    return max(curves_of(summary, trials).values(), key=len, default=[])


def normalisation_batch(summary: Summary, trials: Trials) -> Picture:
    """Test error against the samples that share statistics; below, other statistics, training loss, the literature."""
    curves, main = curves_of(summary, trials), main_curve(summary, trials)
    small = [draw for draw in (_statistics, _losses) if draw(None, summary, main)]
    figure, top, below, last = _layout(len(small), bool(published_curves(summary)))
    _errors(top, summary, curves)
    for place, draw in zip(below, small, strict=True):
        draw(place, summary, main)
    if last is not None:
        _published(last, summary)
    reading = "Large marks: median over seeds; small: a seed; level lines: arms that share nothing"
    caption = f"{setting(summary)}. {reading}."
    return finish(figure, "normalisation_batch", _title(summary, main), caption)


def _layout(
    num_small: int, published: bool
) -> tuple["Figure", "Axes", list["Axes"], "Axes | None"]:
    """A wide panel, under it small ones side by side, and under those a wide one for the literature."""
    rows = [1.25, *([1.0] if num_small else []), *([0.9] if published else [])]
    figure = new_figure(1.0 + 2.85 * sum(rows))
    grid = figure.add_gridspec(len(rows), max(1, num_small), height_ratios=rows)
    small = [figure.add_subplot(grid[1, place]) for place in range(num_small)]
    last = figure.add_subplot(grid[-1, :]) if published else None
    return figure, figure.add_subplot(grid[0, :]), small, last


def _errors(axes: "Axes", summary: Summary, curves: Mapping[str, Curve]) -> None:
    """A line a curve, its marks in the style of their arms; a level line for each arm without a batch."""
    decides = decided_by(summary)
    given = arm_styles(arms_with(summary, decided_by(summary).name))
    for curve in curves.values():
        sizes = [size for size, _ in curve]
        medians = [_median(summary, arm, decides.name) for _, arm in curve]
        axes.plot(sizes, medians, color="#999999", linewidth=1.2, zorder=1)
        for size, arm in curve:
            _point(
                axes, size, decides.factor * array_of(summary, arm, decides.name), given[arm], arm
            )
    joined = {arm for curve in curves.values() for _, arm in curve}
    for arm, style in given.items():
        if arm not in joined:
            level = _median(summary, arm, decides.name)
            axes.axhline(level, color=style.colour, linestyle=style.line, label=arm)
    _over_samples(axes, summary, sorted({size for curve in curves.values() for size, _ in curve}))
    axes.set_ylabel(f"{axis_label(summary, decides.name)}, log")
    if not (decides.is_share or decides.lower_is_better):
        axes.set_yscale("linear")
        axes.set_ylabel(axis_label(summary, decides.name))
    axes.legend(loc="upper right", ncols=2 if len(given) > 4 else 1, fontsize=10)


def _point(axes: "Axes", size: int, values: Any, style: ArmStyle, label: str) -> None:
    """An arm's median with a thin mark for each seed."""
    sizes = np.full(len(values), float(size))
    axes.plot(sizes, values, style.marker, color=style.colour, alpha=0.3, markersize=4)
    median = np.median(values)
    axes.plot([size], [median], style.marker, color=style.colour, markersize=9, label=label)


def _median(summary: Summary, arm: str, metric: str) -> float:
    """As it is shown: of a share in percent."""
    median = median_of(summary, arm, metric)
    return np.nan if median is None else shown(summary, metric).factor * median


def _over_samples(axes: "Axes", summary: Summary, sizes: list[int]) -> None:
    """Samples on a scale of powers of two, and under each how many ranks hold so many."""
    each, ranks = summary["design"]["per_rank_batch"], summary["design"]["world_size"]
    axes.set_xscale("log", base=2)
    words = [
        f"{size}\n{size // each} rank{'s' * (size > each)}"
        if ranks > 1 and size % each == 0
        else str(size)
        for size in sizes
    ]
    axes.set_xticks(sizes, words)
    axes.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
    axes.minorticks_off()
    axes.set_xlabel("Samples that share batch statistics (log scale)")
    axes.set_yscale("log")
    plain_log(axes.yaxis)


def _statistics(axes: "Axes | None", summary: Summary, main: Curve) -> bool:
    """The same networks evaluated with running, precise and batch statistics."""
    known = [m for m in _STATISTICS if all(arm in arms_with(summary, m) for _, arm in main)]
    if axes is None or len(known) < 2:
        return len(known) > 1
    for metric in known:
        style = _STATISTICS[metric]
        medians = [_median(summary, arm, metric) for _, arm in main]
        label = metric.removeprefix("test_error_")
        sizes = [size for size, _ in main]
        axes.plot(
            sizes, medians, marker=style.marker, color=style.colour, ls=style.line, label=label
        )
    _small(axes, summary, main, "By statistics used to evaluate", "Test error (%), log")
    axes.legend(fontsize=10)
    return True


def _losses(axes: "Axes | None", summary: Summary, main: Curve) -> bool:
    """Training loss of the same networks."""
    known = all(arm in arms_with(summary, "train_loss") for _, arm in main)
    if axes is None or not known:
        return known
    medians = [median_of(summary, arm, "train_loss") or np.nan for _, arm in main]
    axes.plot([size for size, _ in main], medians, "D-", color=SOFT)
    _small(axes, summary, main, "In training", "Training loss, log")
    return True


def _small(axes: "Axes", summary: Summary, main: Curve, title: str, label: str) -> None:
    sizes = [size for size, _ in main]
    _over_samples(axes, summary, sizes)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("Samples that share them (log)")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=12)


def _published(axes: "Axes", summary: Summary) -> None:
    """Curves of the literature against the same kind of number, on other data and networks."""
    curves = published_curves(summary)
    for (label, sizes, errors), style in zip(
        curves, arm_styles([*map(str, curves)]).values(), strict=True
    ):
        axes.plot(
            sizes, errors, marker=style.marker, color=style.colour, ls=style.line, label=label
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({size for _, sizes, _ in curves for size in sizes})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=10)
    axes.minorticks_off()
    axes.set(xlabel="Samples that share them (log)", ylabel="Error (%)")
    axes.set_title("Published: other data and networks, not this study", loc="left", fontsize=12)
    axes.legend(fontsize=10)


def published_curves(summary: Summary) -> list[tuple[str, list[float], list[float]]]:
    """Label, sizes and errors of each published row whose columns and cells are all numbers."""
    found = []
    for table in summary["design"].get("published") or []:
        sizes = _numbers(table["columns"])
        rows = {name: _numbers(cells) for name, cells in table["rows"].items()}
        source = table["source"].split(" (")[0]
        found += [
            (f"{name}, {source}", sizes, errors)
            for name, errors in rows.items()
            if len(sizes) > 2 and len(errors) == len(sizes)
        ]
    return found


def _numbers(cells: list[str]) -> list[float]:
    """The cells as numbers; none at all where one is not."""
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return []


def _title(summary: Summary, main: Curve) -> str:
    """The error at the fewest samples, at the most, and where it is smallest if that is neither."""
    (few, first), (many, last) = main[0], main[-1]
    if (summary["design"].get("primary_metric") or "") == "precise_gap":
        return _gap_title(summary, main)
    decides = decided_by(summary)
    errors = {arm: median_of(summary, arm, decides.name) for _, arm in main}
    words = {arm: value_words(decides, error) for arm, error in errors.items()}
    subject = capital(split_words(summary, decides.name))
    found = f"{subject} is {words[first]} where {few} samples share statistics, {words[last]} where {many} do"
    known = {arm: decides.sign * error for arm, error in errors.items() if error is not None}
    best = min(known, key=known.__getitem__, default=first)
    if best in (first, last):
        return found
    size = next(size for size, arm in main if arm == best)
    return (
        f"{found}; {'smallest' if decides.lower_is_better else 'largest'} at {size}: {words[best]}"
    )


def _gap_title(summary: Summary, main: Curve) -> str:
    gaps = [(size, median_of(summary, arm, "precise_gap")) for size, arm in (main[0], main[-1])]
    words = [
        f"{value_words(shown(summary, 'precise_gap'), gap)} at {size} samples" for size, gap in gaps
    ]
    return f"Precise statistics lower the error by {words[0]}, by {words[1]}"
