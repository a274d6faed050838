"""Numbers in words: rounded, with their unit, as figures, report and terminal share them.

Functions take a metric by its name, or as the `Measure` by which a study shows it. None stands for what JSON has no
number for, and reads as a dash.
"""

from syncbn.compare.measure import PERCENT, POINTS, Measure, measure
from syncbn.compare.report.words.text import capital

NOTHING, TIMES, MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


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


def value_words(metric: str | Measure, value: float | None) -> str:
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


def bare(metric: str | Measure, value: float | None) -> str:
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


def range_words(metric: str | Measure, low: float | None, high: float | None) -> str:
    """Two values of a metric with their unit once: `5.6 to 6.4 %`."""
    if low is None or high is None:
        return NOTHING
    return f"{bare(metric, low)} to {value_words(metric, high)}"


def labelled(metric: str | Measure) -> str:
    """The metric with its unit, as an axis or a column is headed: `Test error (%)`."""
    found = measure(metric)
    unit = found.unit or found.scale
    words = capital(found.words)
    return f"{words} ({unit})" if unit not in ("", "steps", "cells") else words


def is_zero(text: str) -> bool:
    """Whether a rounded number shows nothing but zeros."""
    return not any(sign in "123456789" for sign in text)


def p_words(p: float | None) -> str:
    """A p value after its sign: `= 0.031`, `< 0.001`."""
    return p_cell(p) if p is None or p < 0.001 else f"= {p_cell(p)}"


def p_cell(p: float | None) -> str:
    """A p value for a cell: `0.031`, `< 0.001`."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def time_words(seconds: float) -> str:
    """A duration as people say it: `8 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
