"""The report of a study: Markdown, a self-contained HTML page, and a table for the terminal.

The decision that shaped the file: all three are filled from the same rows of words, made once from the
summary, so they differ in dress only. Every text is escaped where it enters a format, and nowhere else.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.compare.canvas import Picture
from syncbn.compare.tables import CLAIM_HEADER, Summary, arm_header, arm_rows, claim_rows
from syncbn.compare.wording import setting, tally, verdict_sentence

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLOURS = {"REPRODUCED": "green", "NOT REPRODUCED": "red", "INCONCLUSIVE": "yellow"}
NO_COMMAND = "No file in conf/study/ asks this question; the config below is the whole study."


@dataclass(frozen=True)
class Page:
    """What a report is made of."""

    summary: Summary
    question: str
    command: str | None
    """Shell command that repeats the study, None where no study file holds it."""
    config: Mapping[str, Any]
    """Everything that decides the numbers."""
    pictures: Sequence[Picture]


def markdown(page: Page) -> str:
    """The report as Markdown; figures are links into `figures/`."""
    summary = page.summary
    parts = [
        f"# {_md(summary['study'])}: {_md(page.question)}",
        f"**{tally(summary['claims'])}.** {_md(setting(summary))}.",
        "## Arms",
        _md_table(arm_header(summary), arm_rows(summary)),
        "## Claims",
        _md_table(CLAIM_HEADER, claim_rows(summary)),
        *(
            f"- **{_md(c['name'])}**. {_md(c['statement'])} {_md(verdict_sentence(c))}"
            for c in summary["claims"]
        ),
        "## Figures",
        *(_md_picture(picture) for picture in page.pictures),
        "## Repeat it",
        f"```\n{page.command}\n```" if page.command else NO_COMMAND,
        "## Versions",
        _md_table(("package", "version"), _version_rows(summary)),
        "## Config",
        f"```json\n{json.dumps(page.config, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    """`text` with what Markdown or HTML would take for markup made plain."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _md_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_md(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md_picture(picture: Picture) -> str:
    return f"![{_md(picture.title)}](figures/{picture.name}.png)"


def _version_rows(summary: Summary) -> list[tuple[str, str]]:
    return [*summary["versions"].items(), ("git", summary["git"])]


_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; min-width: 100%; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: #555; font-weight: 600; } figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.soft { color: #555; font-size: .9rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; border-radius: 4px; font-size: .85rem; }
.verdict { font-weight: 700; } .REPRODUCED { color: #00598c; } .NOT { color: #b34700; }
.INCONCLUSIVE { color: #555; }
"""


def html(page: Page) -> str:
    """The report as one HTML file that asks for nothing outside itself."""
    summary = page.summary
    title = f"{escape(summary['study'])}: {escape(page.question)}"
    command = f"<pre>{escape(page.command)}</pre>" if page.command else f"<p>{NO_COMMAND}</p>"
    config = escape(json.dumps(page.config, indent=2))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_CSS}</style></head><body>
<h1>{title}</h1>
<p><strong>{tally(summary["claims"])}.</strong> <span class="soft">{escape(setting(summary))}</span></p>
<h2>Arms</h2>
{_html_table(arm_header(summary), arm_rows(summary))}
<h2>Claims</h2>
{_html_table(CLAIM_HEADER, claim_rows(summary))}
<ul>{"".join(_html_claim(claim) for claim in summary["claims"])}</ul>
<h2>Figures</h2>
{"".join(_html_picture(picture) for picture in page.pictures)}
<h2>Repeat it</h2>
{command}
<h2>Versions</h2>
{_html_table(("package", "version"), _version_rows(summary))}
<h2>Config</h2>
<details><summary>Everything that decides the numbers</summary><pre>{config}</pre></details>
</body></html>
"""


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(text: str) -> str:
    verdict = f' class="verdict {text}"' if text in COLOURS else ""
    return f"<td{verdict}>{escape(text)}</td>"


def _html_claim(claim: Mapping[str, Any]) -> str:
    return (
        f"<li><strong>{escape(claim['name'])}</strong>. {escape(claim['statement'])} "
        f"{escape(verdict_sentence(claim))}</li>"
    )


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{escape(picture.title)}. {escape(picture.caption)}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def print_table(summary: Summary, console: "Console", folder: Path | None = None) -> None:
    """Print arms, claims and where the files are; `folder` is the study's, by default under runs/."""
    from rich.markup import escape as plain

    arms = _rich_table(f"{summary['study']}: {setting(summary)}", arm_header(summary))
    for row in arm_rows(summary):
        arms.add_row(*map(plain, row))
    claims = _rich_table(tally(summary["claims"]), CLAIM_HEADER[:-1])
    for name, verdict, *cells, _ in claim_rows(summary):
        colour = COLOURS[verdict]
        claims.add_row(plain(name), f"[bold {colour}]{verdict}[/]", *map(plain, cells))
    console.print(arms)
    console.print(claims)
    for claim in summary["claims"]:
        console.print(
            f"  {claim['name']}: {verdict_sentence(claim)}", markup=False, highlight=False
        )
    place = folder or Path("runs") / summary["study"]
    console.print(f"Report: {place / 'report.html'}", markup=False, highlight=False)


def _rich_table(title: str, header: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.pad_edge, table.collapse_padding = False, True
    for name in header:
        table.add_column(name, overflow="fold")
    return table
