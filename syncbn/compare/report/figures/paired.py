"""The figure of claims: the number of each seed beside what the claim demands.

Claims differ in metric, unit and form, so each has a row and an axis of its own. A claim that has no number for some
seed is named in the caption, because a row without that seed would hide it.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from syncbn.compare.report.figures.canvas import SOFT, Picture, finish, new_figure
from syncbn.compare.report.figures.series import Trials
from syncbn.compare.report.words.claims import (
    Claim,
    comparison_words,
    effect_words,
    form,
    is_fraction,
    no_effect,
    tally,
    threshold_words,
    unit_of,
)
from syncbn.compare.report.words.study import setting
from syncbn.compare.statistics.effects import Floats
from syncbn.compare.study.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPACT_FROM = 5
"""So many claims or more have low rows."""
_ALLOWED, _WITHIN_MARGIN = "#e3efc9", "#f3f7ea"
_COLOURS = {"REPRODUCED": "#00598c", "NOT REPRODUCED": "#b34700", "INCONCLUSIVE": SOFT}
"""Dark enough for text on white; those of the HTML page."""
_MARKS = {"REPRODUCED": "D", "NOT REPRODUCED": "X", "INCONCLUSIVE": "o"}


def judged(summary: Summary) -> list[Claim]:
    """Claims with a number for every seed, which can be drawn: primary ones first."""
    drawn = [claim for claim in summary["claims"] if claim["pairs"] and None not in claim["pairs"]]
    return sorted(drawn, key=lambda claim: not claim["primary"])


def has_claims(summary: Summary, _: Trials) -> bool:
    """Whether some claim can be drawn."""
    return bool(judged(summary))


def paired_differences(summary: Summary, _: Trials) -> Picture:
    """A row a claim: a dot a seed, the effect, its interval, and what the claim demands."""
    claims = judged(summary)
    compact = len(claims) >= COMPACT_FROM
    figure = new_figure(1.1 + (1.32 if compact else 1.85) * len(claims))
    rows = figure.subplots(len(claims), 1, squeeze=False).ravel()
    for axes, claim in zip(rows, claims, strict=True):
        _claim_row(axes, claim)
        axes.set_title(_heading(claim), loc="left", fontsize=11, color=_COLOURS[claim["verdict"]])
        axes.set_xlabel(_label(claim), fontsize=10, labelpad=1)
        axes.tick_params(axis="x", labelsize=10)
    caption = (
        f"{setting(summary)}. A dot a seed; large mark: median; line: 95 % interval; thick: 90 % interval of the "
        f"equivalence test; green: what the claim demands.{_undrawn(summary, claims)}"
    )
    return finish(figure, "paired_differences", tally(summary["claims"]), caption)


def _undrawn(summary: Summary, drawn: Sequence[Claim]) -> str:
    names = [claim["name"] for claim in summary["claims"] if claim not in drawn]
    return f" Not drawn, as some seeds have no number: {', '.join(names)}." if names else ""


def _heading(claim: Claim) -> str:
    """Verdict, name, what was found and what was claimed."""
    secondary = "" if claim["primary"] else " (secondary)"
    found = f"{effect_words(claim, claim['effect'])}, claimed {threshold_words(claim)}"
    return f"{claim['verdict']}{secondary}: {claim['name']}\n{textwrap.shorten(found, 92)}"


def _label(claim: Claim) -> str:
    unit = {"ratio": "ratio", "trend": "Kendall's tau"}.get(form(claim), unit_of(claim).strip())
    return textwrap.shorten(comparison_words(claim), 80) + (f" ({unit})" if unit else "")


def _claim_row(axes: "Axes", claim: Claim) -> None:
    scale = 100 if is_fraction(claim) else 1
    colour = _COLOURS[claim["verdict"]]
    pairs = scale * np.array(claim["pairs"], dtype=float)
    axes.plot(pairs, np.linspace(0.4, 0.8, len(pairs)), "o", color=SOFT, alpha=0.7, markersize=5)
    _bar(axes, claim["ci"], scale, colour, 2)
    _bar(axes, claim["ci90"], scale, colour, 6)
    mark = _MARKS.get(claim["verdict"], "o")
    axes.plot(scale * claim["effect"], 0, mark, color=colour, markersize=9, zorder=3)
    axes.set(ylim=(-0.4, 1), yticks=[])
    axes.spines["left"].set_visible(False)
    _spread_out(axes, claim, pairs, scale)
    _demand(axes, claim, scale)


def _bar(
    axes: "Axes", ends: Sequence[float | None] | None, scale: int, colour: str, width: int
) -> None:
    if ends is not None and None not in ends:
        axes.hlines(0, *(scale * np.array(ends, dtype=float)), color=colour, linewidth=width)


def _spread_out(axes: "Axes", claim: Claim, pairs: Floats, scale: int) -> None:
    """A logarithmic axis for what spans powers of ten or whose threshold lies powers of ten away."""
    threshold = [scale * claim["threshold"]] if claim["kind"] in ("less", "greater") else []
    shown = np.array([*pairs, *threshold])
    if form(claim) in ("ratio", "value") and shown.min() > 0 and shown.max() > 20 * shown.min():
        axes.set_xlim(shown.min() / 3, shown.max() * 3)
        axes.set_xscale("log")


def demanded(claim: Claim) -> list[tuple[float, float]]:
    """The ranges in which the claim demands the whole interval; infinite ends are those of the axes."""
    threshold, low = claim["threshold"], -math.inf
    none = no_effect(claim) or 0.0
    ratio = form(claim) == "ratio"
    margin = (1 / threshold if ratio and threshold else -threshold, threshold)
    return {
        "less": [(low, threshold)],
        "greater": [(threshold, math.inf)],
        "equivalent": [margin],
        "within": [tuple(claim["range"])],
        "different": [(low, none), (none, math.inf)],
        "increasing": [(threshold, math.inf)],
        "decreasing": [(low, -threshold)],
    }[claim["kind"]]


def _demand(axes: "Axes", claim: Claim, scale: int) -> None:
    """Shade what the claim demands, with a line at each of its edges, and show no effect for scale."""
    none = no_effect(claim)
    if none is not None and form(claim) != "share":
        axes.axvline(scale * none, color=SOFT, linewidth=0.8)
    stretches = [(scale * low, scale * high) for low, high in demanded(claim)]
    for edge in {edge for stretch in stretches for edge in stretch if math.isfinite(edge)}:
        axes.axvline(edge, color="black", linestyle="--", linewidth=1.2)
    left, right = axes.get_xlim()
    if claim["kind"] == "different" and claim["threshold"]:
        _margin(axes, claim, scale)
    for low, high in stretches:
        axes.axvspan(max(low, left), min(high, right), color=_ALLOWED, zorder=0)
    axes.set_xlim(left, right)


def _margin(axes: "Axes", claim: Claim, scale: int) -> None:
    """Paler where an effect counts as none once both one-sided tests put it there."""
    threshold = claim["threshold"]
    low, high = (1 / threshold if form(claim) == "ratio" else -threshold), threshold
    axes.axvspan(scale * low, scale * high, color=_WITHIN_MARGIN, zorder=0.5)
    for edge in (low, high):
        axes.axvline(scale * edge, color=SOFT, linestyle=":", linewidth=1.2)
