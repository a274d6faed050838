"""How every figure of a study looks: one style, one colour and marker an arm, one way to finish.

The decision that shaped the file: an arm keeps its look in all figures of all studies, and differs from the
others in colour (Okabe and Ito's, safe for colour-blind eyes), marker and line style at once, so that grey
print tells them apart too. No pyplot: figures hold no global state.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 2.0,
}
WIDTH, HEIGHT, DPI = 7.5, 4.4, 120
"""Inches and dots an inch: 900 pixels wide."""
SOFT = "#555555"


@dataclass(frozen=True)
class Look:
    """What an arm is drawn with."""

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


_LOOKS = {
    "none": Look("#6e6e6e", "s", (0, (1, 1))),
    "local": Look("#d55e00", "^", (0, (5, 2))),
    "sync": Look("#0072b2", "o", "-"),
    "big_batch": Look("#000000", "x", (0, (3, 2, 1, 2))),
    "group_norm": Look("#009e73", "D", (0, (4, 1, 1, 1, 1, 1))),
    "sync_group": Look("#56b4e9", "v", (0, (7, 2))),
    "ghost": Look("#cc79a7", "P", (0, (2, 1))),
    "local_avg": Look("#e69f00", "<", (0, (3, 1, 1, 1))),
    "torch_sync": Look("#8b5a2b", "*", (0, (6, 1, 1, 1))),
}


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """The look of each arm: its own where it is a known norm, else the first that no arm here has."""
    free = [look for name, look in _LOOKS.items() if name not in arms] or list(_LOOKS.values())
    others = [arm for arm in arms if arm not in _LOOKS]
    given = {arm: free[i % len(free)] for i, arm in enumerate(others)}
    return {arm: _LOOKS.get(arm) or given[arm] for arm in arms}


def new_figure(height: float = HEIGHT) -> "Figure":
    """An empty figure of the common width; call inside `styled()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def styled() -> Any:
    """Context manager under which figures are made and finished."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def finish(figure: "Figure", name: str, title: str, caption: str) -> Picture:
    """Put title and caption on `figure` and turn it into a `Picture`."""
    left = {"x": 0.01, "horizontalalignment": "left"}
    figure.suptitle(textwrap.fill(title, 72), **left, fontsize=12, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, 120), **left, fontsize=8.5, color=SOFT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Picture(name, title, caption, buffer.getvalue())
