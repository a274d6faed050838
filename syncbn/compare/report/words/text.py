"""Text: capitals and lists in sentences, and tables as lines, for a terminal or in Markdown.

Both tables take the same rows of words, so what is printed and what is written say the same.
"""

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


def counted(number: int, one: str, several: str) -> str:
    """`1 study`, `2 studies`."""
    return f"{number} {one if number == 1 else several}"


def capital(text: str) -> str:
    """`text` as a sentence begins."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
