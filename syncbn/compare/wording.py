"""Numbers, arms and effects in words, as the figures, the report and the terminal share them.

The decision that shaped the file: a number is rounded and given its unit in one place. An effect has one of five
forms (a difference, a ratio, a share of looks, a trend, an arm's own value), and whatever words or draws it asks
`form` which. `None` stands for what JSON has no number for, and reads as a dash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.compare.measures import PERCENT, POINTS, measure, metric_words

Claim = Mapping[str, Any]
ARM_WORDS = {
    "none": "no norm",
    "bn": "batch norm",
    "local": "local batch norm",
    "local_avg": "local batch norm, averaged buffers",
    "sync": "synchronised batch norm",
    "sync_group": "batch norm synchronised in groups",
    "big_batch": "one big batch",
    "torch_sync": "torch's SyncBatchNorm",
    "group_norm": "group norm",
    "ghost": "ghost batch norm",
}
NOTHING, TIMES, MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


def arm_words(arm: str) -> str:
    """The arm in words; an arm of a study's own keeps its name."""
    return ARM_WORDS.get(arm, arm)


def arm_first(arm: str) -> str:
    """The arm in words as a sentence begins; a name of a study's own stays as it is."""
    return capital(arm_words(arm)) if arm in ARM_WORDS else arm


def capital(text: str) -> str:
    """`text` as a sentence begins."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, without an exponent where it has none to spare."""
    if value is None:
        return NOTHING
    text = f"{value:#.{digits}g}".rstrip(".")
    if 0 < abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    elif "e+" in text and abs(value) < 1e6:
        text = f"{value:.0f}"
    return text.replace("-", MINUS)


def percent(value: float) -> str:
    """A fraction times 100: `5.9`; never a minus before zero."""
    return f"{100 * value:z.1f}".replace("-", MINUS)


def value_words(metric: str, value: float | None) -> str:
    """A measured value with its unit: `5.9 %`, `1.23 s`, `0.041`, `21.3 kB`."""
    if value is None:
        return NOTHING
    unit = measure(metric).unit
    if unit in (PERCENT, POINTS):
        return f"{percent(value)} {unit}"
    if unit == "bytes":
        return byte_words(value)
    if unit in ("steps", "cells"):
        return f"{value:g} {unit}"
    return f"{number(value)} {unit}".rstrip()


def bare(metric: str, value: float | None) -> str:
    """A measured value without its unit, for beside another that has it."""
    words = value_words(metric, value)
    return words.removesuffix(f" {measure(metric).unit}")


def byte_words(value: float) -> str:
    """Bytes in the largest unit that leaves a whole number before the point."""
    for unit in ("bytes", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} GB"


def range_words(metric: str, low: float | None, high: float | None) -> str:
    """Two values of a metric with their unit once: `5.6 to 6.4 %`."""
    if low is None or high is None:
        return NOTHING
    return f"{bare(metric, low)} to {value_words(metric, high)}"


def labelled(metric: str) -> str:
    """The metric with its unit, as an axis or a column is headed: `Test error (%)`."""
    unit = measure(metric).unit
    words = capital(metric_words(metric))
    return f"{words} ({unit})" if unit not in ("", "steps", "cells") else words


def form(claim: Claim) -> str:
    """What the claim's number is: `ratio`, `share`, `trend`, `value` or `difference`."""
    if claim.get("along"):
        return "trend"
    if claim["scale"] in ("ratio", "share"):
        return claim["scale"]
    return "difference" if claim.get("against", True) else "value"


def is_fraction(claim: Claim) -> bool:
    """Whether the claim's number is shown times 100."""
    if form(claim) == "share":
        return True
    plain = form(claim) in ("difference", "value")
    return plain and measure(claim["metric"]).unit in (PERCENT, POINTS)


def no_effect(claim: Claim) -> float | None:
    """The number that means "no effect", None where there is none."""
    return {"ratio": 1.0, "share": 0.5, "trend": 0.0, "difference": 0.0}.get(form(claim))


def unit_of(claim: Claim) -> str:
    """The unit after the claim's number, with a blank before it."""
    kind, unit = form(claim), measure(claim["metric"]).unit
    if kind in ("ratio", "trend") or unit == "bytes":
        return ""
    if kind == "share":
        return " %"
    return " points" if kind == "difference" and unit == PERCENT else f" {unit}".rstrip()


def effect_number(claim: Claim, value: float | None) -> str:
    """The claim's number without its unit; a difference and a trend with their sign."""
    if value is None:
        return NOTHING
    bytewise = measure(claim["metric"]).unit == "bytes" and form(claim) in ("difference", "value")
    text = (
        percent(value) if is_fraction(claim) else byte_words(value) if bytewise else number(value)
    )
    signed = form(claim) in ("difference", "trend") and value != 0
    return text if text.startswith(MINUS) or not signed or is_zero(text) else f"+{text}"


def is_zero(text: str) -> bool:
    """Whether a rounded number shows nothing but zeros."""
    return not any(sign in "123456789" for sign in text)


def effect_words(claim: Claim, value: float | None) -> str:
    """An effect, an interval's end or a threshold of `claim` with its unit: `-30.1 points`, `x0.42`, `94.0 %`."""
    if value is None:
        return NOTHING
    sign = {"ratio": TIMES, "trend": "tau "}.get(form(claim), "")
    return f"{sign}{effect_number(claim, value)}{unit_of(claim)}"


_BOUNDS = {"trend": (-1.0, 1.0), "share": (0.0, 1.0)}
"""What a number of that form cannot go beyond; a t interval does not know it."""


def interval_words(claim: Mapping[str, Any], ends: Sequence[float | None]) -> str:
    """An interval of `claim`, in the unit of its effect: `-38.3 to -24.9 points`."""
    low, high = ends
    if low is None or high is None:
        return NOTHING
    least, most = _BOUNDS.get(form(claim), (low, high))
    sign = TIMES if form(claim) == "ratio" else ""
    words = (sign + effect_number(claim, end) for end in (max(low, least), min(high, most)))
    return " to ".join(words) + unit_of(claim)


def without_unit(claim: Claim, words: str) -> str:
    """`words` about `claim` for a cell beside its effect, which names the unit already."""
    return words.removesuffix(unit_of(claim)) if unit_of(claim) else words


def p_words(p: float | None) -> str:
    """A p value after its sign: `= 0.031`, `< 0.001`."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
