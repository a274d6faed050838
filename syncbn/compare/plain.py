"""Tables as lines of text: for a terminal or a log, and in Markdown.

The decision that shaped the file: both take the same rows of words, so what is printed and what is written cannot
differ but in dress.
"""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned(header: Sequence[str], rows: Rows) -> str:
    """`header` over `rows`, columns padded to the widest cell, two spaces between."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    )
    return "\n".join(line.rstrip() for line in padded)


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table; `rows` are plain text, in which nothing is markup."""
    lines = [list(header), ["---"] * len(header), *([escaped(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would take for markup made plain."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def p_cell(p: float | None) -> str:
    """A p value for a cell: `0.031`, `< 0.001`."""
    if p is None:
        return "\N{EN DASH}"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def counted(number: int, one: str, several: str) -> str:
    """`1 study`, `2 studies`."""
    return f"{number} {one if number == 1 else several}"
