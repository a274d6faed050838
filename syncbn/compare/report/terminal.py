"""The end of a study in the terminal: its arms, its verdicts, and where the report is.

Names come from a study file and may hold anything, so they are printed as they are and never as markup.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from syncbn.compare.report.tables import CLAIM_HEADER, arm_header, arm_rows, claim_rows
from syncbn.compare.report.words.claims import tally, verdict_sentence
from syncbn.compare.report.words.study import setting
from syncbn.compare.study.summary import Summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNBROKEN = "\N{NO-BREAK SPACE}"
COLOURS = {"REPRODUCED": "green", "NOT REPRODUCED": "red", "INCONCLUSIVE": "yellow"}


def print_table(summary: Summary, console: "Console", folder: Path | None = None) -> None:
    """Print arms, claims and where the files are; `folder` is the study's, by default under runs/."""
    from rich.markup import escape as plain

    arms = _rich_table(f"{summary['study']}: {setting(summary)}", arm_header(summary))
    for row in arm_rows(summary):
        arms.add_row(*(plain(cell).replace(" ", _UNBROKEN) for cell in row))
    claims = _rich_table(tally(summary["claims"]), CLAIM_HEADER[:-1])
    for name, verdict, *cells, _ in claim_rows(summary):
        colour = COLOURS[verdict]
        claims.add_row(plain(name), f"[bold {colour}]{verdict}[/]", *map(plain, cells))
    console.print(arms)
    if summary["claims"]:
        console.print(claims)
    for claim in summary["claims"]:
        console.print(
            f"  {claim['name']}: {verdict_sentence(claim)}", markup=False, highlight=False
        )
    place = folder or Path("runs") / summary["study"]
    console.print(f"Report: {place / 'report.html'}", markup=False, highlight=False)


def _rich_table(title: str, header: Sequence[str]) -> "Table":
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.pad_edge, table.collapse_padding = False, True
    for name in header:
        table.add_column(name, overflow="fold")
    return table
