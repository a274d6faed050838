"""How every figure of a study looks: one style, one colour and marker an arm, one way to finish.

An arm has the same style in all figures of all studies, and differs from the others in colour (Okabe and Ito's, safe
for colour-blind eyes), marker and line style at once, so that they are told apart in grey print too. pyplot is not
used: figures hold no global state.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2.0,
}
WIDTH, HEIGHT, DPI = 7.5, 4.4, 120
"""Inches and dots an inch: 900 pixels wide."""
SOFT = "#555555"


@dataclass(frozen=True)
class ArmStyle:
    """Colour, marker and line that an arm is drawn with."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Picture:
    """A finished figure: file name without suffix, the finding it shows, how to read it."""

    name: str
    title: str
    caption: str
    png: bytes


_STYLES = {
    "none": ArmStyle("#6e6e6e", "s", (0, (1, 1))),
    "local": ArmStyle("#d55e00", "^", (0, (5, 2))),
    "sync": ArmStyle("#0072b2", "o", "-"),
    "big_batch": ArmStyle("#000000", "x", (0, (3, 2, 1, 2))),
    "group_norm": ArmStyle("#009e73", "D", (0, (4, 1, 1, 1, 1, 1))),
    "sync_group": ArmStyle("#56b4e9", "v", (0, (7, 2))),
    "ghost": ArmStyle("#cc79a7", "P", (0, (2, 1))),
    "local_avg": ArmStyle("#e69f00", "<", (0, (3, 1, 1, 1))),
    "torch_sync": ArmStyle("#8b5a2b", "*", (0, (6, 1, 1, 1))),
}
_SPARE_MARKERS = (">", "p", "h", "8", "X", "d", "1", "3", "4")
"""For a second round of styles, where a study has more arms than `_STYLES`."""


def _style(place: int) -> ArmStyle:
    """The style in that place of an endless row: no two share colour, marker and line style."""
    known = list(_STYLES.values())
    turn, i = divmod(place, len(known))
    if not turn:
        return known[i]
    marker = _SPARE_MARKERS[i] if turn == 1 else known[i - turn].marker
    return ArmStyle(known[i].colour, marker, known[(i + turn) % len(known)].line)


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """The style of each arm: its own where it is a known norm, else the first that no arm here has."""
    others = [arm for arm in arms if arm not in _STYLES]
    names = list(_STYLES)
    row = (i for i in range(len(names) + len(arms)) if i >= len(names) or names[i] not in arms)
    given = {arm: _style(i) for arm, i in zip(others, row, strict=False)}
    return {arm: _STYLES.get(arm) or given[arm] for arm in arms}


def new_figure(height: float = HEIGHT) -> "Figure":
    """An empty figure of the common width; call inside `styled()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def panels(
    num: int, columns: int, height: float, *, legend: float = 0.0, shared: str = ""
) -> tuple["Figure", list["Axes"], "Axes"]:
    """A figure with `num` panels in rows of `columns`, each `height` inches, under a strip for a legend.

    Args:
        num: how many panels.
        columns: the most in a row.
        height: of a panel, in inches.
        legend: height of the strip, in inches.
        shared: axes that all panels have in common: `x`, `y`, both or none. Only outer panels have their labels.

    Returns:
        The figure, its panels row by row, and the strip.
    """
    columns = min(columns, num)
    rows = -(-num // columns)
    figure = new_figure(1.15 + legend + rows * height)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[legend + 0.01, *[height] * rows])
    found: list[Axes] = []
    for place in range(num):
        one = found[0] if found else None
        ties = {f"share{axis}": one for axis in shared}
        found.append(figure.add_subplot(grid[1 + place // columns, place % columns], **ties))
    for place, axes in enumerate(found):
        axes.tick_params(labelbottom="x" not in shared or place + columns >= num)
        axes.tick_params(labelleft="y" not in shared or place % columns == 0)
    strip = figure.add_subplot(grid[0, :])
    strip.axis("off")
    return figure, found, strip


def legend_strip(strip: "Axes", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, in the strip over them."""
    strip.legend(handles, labels, loc="center left", ncols=columns_of(labels), borderaxespad=0)


def strip_height(labels: Sequence[str]) -> float:
    """Inches that `legend_strip` needs."""
    return 0.12 + 0.26 * -(-len(labels) // columns_of(labels))


def columns_of(labels: Sequence[str]) -> int:
    """How many columns of a legend fit the common width (4 of 13 letters, 1 of 40)."""
    longest = max(map(len, labels), default=0)
    return max(1, min(4, 78 // (longest + 6)))


def legend_height(labels: Sequence[str]) -> float:
    """Inches that a legend of these labels takes beyond its first two rows."""
    return 0.24 * max(0, -(-len(labels) // columns_of(labels)) - 2)


def legend_above(axes: "Axes") -> None:
    """A legend over the axes, where it hides nothing."""
    labels = axes.get_legend_handles_labels()[1]
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns_of(labels),
        handlelength=2.8,
        columnspacing=1.4,
    )


def plain_log(axis: Any) -> None:
    """Ticks of a logarithmic axis in plain numbers, at 1, 2 and 5, or at powers of ten where it spans many."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    wide = low <= 0 or high / low > 3000
    axis.set_major_locator(LogLocator(numticks=9) if wide else LogLocator(subs=(1, 2, 5)))
    if not wide:
        axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def styled() -> Any:
    """Context manager under which figures are made and finished."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def finish(figure: "Figure", name: str, title: str, caption: str) -> Picture:
    """Put title and caption on `figure` and turn it into a `Picture`."""
    left = {"x": 0.01, "horizontalalignment": "left"}
    wider = figure.get_figwidth() / WIDTH
    title_lines, caption_lines = (
        textwrap.fill(text, int(letters * wider)) for text, letters in ((title, 66), (caption, 112))
    )
    figure.suptitle(title_lines, **left, fontsize=13, fontweight="bold")
    figure.supxlabel(caption_lines, **left, fontsize=9.2, color=SOFT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Picture(name, title, caption, buffer.getvalue())
