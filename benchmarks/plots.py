"""Figures of the results, in the style of a study's: a bar a contender and shape, exchanges against ranks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks import scaling
from benchmarks.page import EXCHANGES, NAMES, fitted, shape_words
from benchmarks.verdicts import Results, Row, combinations, geometric_mean, ratios, select
from syncbn.compare.report.figures.canvas import Picture, finish, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "ours": "#0072b2",
    "ours_sockets": "#cc79a7",
    "ours_gloo": "#56b4e9",
    "fairscale": "#e69f00",
    "naive": "#d55e00",
    "reduction": "#009e73",
}
HATCHES = {
    "ours": "",
    "ours_sockets": "\\\\",
    "ours_gloo": "//",
    "fairscale": "..",
    "naive": "xx",
}
"""So that grey print tells bars apart too."""


def draw(results: Results) -> list[Picture]:
    """All figures."""
    with styled():
        return [layer(select(results["layer"], world_size=2)), exchange(results)]


def layer(rows: Sequence[Row]) -> Picture:
    """Ratios to torch's local batch norm, a panel a layout and dtype."""
    figure = new_figure(8.2)
    grid = figure.add_gridspec(3, 2, height_ratios=(0.12, 1, 1))
    first = None
    for place, (layout, dtype) in enumerate(combinations(rows)[:4]):
        axes = figure.add_subplot(grid[1 + place // 2, place % 2], sharex=first, sharey=first)
        first = first or axes
        _bars(axes, select(rows, layout=layout, dtype=dtype))
        axes.set_title(f"{layout} {dtype}", fontsize=11, loc="left")
    if first is not None:
        legend = figure.add_subplot(grid[0, :])
        legend.axis("off")
        legend.legend(*first.get_legend_handles_labels(), loc="center", ncols=3)
    figure.supylabel("time / torch BatchNorm2d without synchronisation", fontsize=10)
    mean = geometric_mean(ratios(rows, "ours", "local"))
    title = (
        f"Synchronised over two ranks, a layer takes {mean:.2f} times as long as torch's local one"
    )
    caption = "Forward and backward, medians, logarithmic scale; the title has the geometric mean."
    return finish(figure, "bench_layer", title, caption)


def _bars(axes: "Axes", rows: Sequence[Row]) -> None:
    names = [name for name in COLOURS if any(name in row["ms"] for row in rows)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        have = [(place, row) for place, row in enumerate(rows) if name in row["ms"]]
        axes.bar(
            [place - 0.4 + (i + 0.5) * width for place, _ in have],
            [ratio - 1 for ratio in ratios(rows, name, "local")],
            width,
            bottom=1,  # what is faster hangs below the line
            label=NAMES[name],
            color=COLOURS[name],
            hatch=HATCHES[name],
            edgecolor="white",
        )
    axes.axhline(1, color="#333333", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(rows)), [shape_words(row) for row in rows], rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=False, axis="x")


def exchange(results: Results) -> Picture:
    """Measured exchanges and the model's, against ranks, for 2048 channels."""
    channels = 2048
    rows = select(results["exchange"], channels=channels)
    figure = new_figure()
    axes = figure.subplots()
    _measured(axes, rows, "shared", COLOURS["ours"])
    _measured(axes, rows, "sockets", COLOURS["ours_sockets"])
    _measured(axes, rows, "gloo", COLOURS["naive"])
    limit = results["gather_bytes"]
    lines = fitted(results["exchange"])
    gather_ranks = results["gather_ranks"]
    nccl = {ranks: scaling.nccl_cost(channels, ranks, gather_ranks) for ranks in scaling.RANKS}
    gloo = {
        ranks: scaling.gloo_cost(*lines, channels, ranks, limit) for ranks in scaling.GLOO_RANKS
    }
    _modelled(axes, nccl, "NCCL", COLOURS["reduction"])
    _modelled(axes, gloo, "gloo", COLOURS["fairscale"])
    axes.axvline(limit / scaling.gather_bytes(channels), color="#555555", linewidth=1)
    axes.set(yscale="log", xlabel="ranks", ylabel="µs an exchange")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 4, *scaling.RANKS], [str(n) for n in (2, 4, *scaling.RANKS)])
    axes.legend(loc="upper left", fontsize=9)
    title = f"Between two ranks of one machine, memory is {_faster(select(rows, world_size=2)[0])}"
    caption = (
        "2048 channels. Upright: where the layer turns from a gather to a reduction over gloo."
    )
    return finish(figure, "bench_exchange", title, caption)


def _faster(row: Row) -> str:
    us = row["us"]
    times = {name: us[name] / us["shared"] for name in ("sockets", "gloo") if name in us}
    return " and ".join(f"{ratio:.0f} times as fast as {name}" for name, ratio in times.items())


def _measured(axes: "Axes", rows: Sequence[Row], name: str, colour: str) -> None:
    have = [row for row in rows if name in row["us"]]
    ranks, us = [row["world_size"] for row in have], [row["us"][name] for row in have]
    if have:
        axes.plot(ranks, us, "o", label=f"{EXCHANGES[name]}, measured", color=colour)


def _modelled(axes: "Axes", costs: Mapping[int, scaling.Cost], name: str, colour: str) -> None:
    gathers, reductions = zip(*((c.gather_us, c.reduce_us) for c in costs.values()), strict=True)
    axes.plot(list(costs), gathers, "--", label=f"{name} gather, model", color=colour)
    axes.plot(list(costs), reductions, ":", label=f"{name} reduction, model", color=colour)
