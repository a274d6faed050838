"""The report as one HTML page that loads nothing from outside itself, for phone and desktop.

The finding and its verdict stand on top, then a card a claim, because a table of claims is wider than a phone. Every
other table scrolls inside its own box. Light only, so that figures and text agree.
"""

import base64
import json
import re
from collections.abc import Iterator, Sequence
from html import escape

from syncbn.compare.report.figures.canvas import Picture
from syncbn.compare.report.page import (
    FAST,
    NO_COMMAND,
    Page,
    arm_table,
    headline,
    is_fast,
    verdict_of,
)
from syncbn.compare.report.tables import (
    Table,
    cell_tables,
    published_tables,
    tuned_table,
    version_rows,
)
from syncbn.compare.report.words.claims import (
    Claim,
    comparison_words,
    conclusion,
    effect_words,
    interval_words,
    tally,
    threshold_words,
)
from syncbn.compare.report.words.numbers import p_cell
from syncbn.compare.report.words.study import setting

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .3rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; } .soft { color: #555; font-size: .9rem; }
.lead { border-left: .4rem solid; padding: .2rem 0 .2rem .9rem; }
.lead p { font-size: 1.15rem; } .lead p + p { color: #1a1a1a; } .lead .pill { font-size: 1rem; }
.pill { display: inline-block; background: currentColor; border-radius: .3rem; padding: .1rem .6rem;
  font-size: .85rem; font-weight: 700; letter-spacing: .02em; }
.pill span { color: #fff; }
.REPRODUCED { color: #00598c; } .NOT { color: #b34700; } .INCONCLUSIVE { color: #555; } .MIXED { color: #333; }
.cards { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); }
.card { border: 1px solid; border-top-width: .35rem; border-radius: .3rem; padding: .7rem .9rem; }
.card > * { color: #1a1a1a; } .card > .pill { color: inherit; } .card h3 { margin: .5rem 0 .2rem; }
.card .effect { font-size: 1.35rem; font-weight: 700; margin: .5rem 0 .1rem; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: .4rem 0; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; font-variant-numeric: tabular-nums; }
.tag { font-weight: 400; color: #555; border: 1px solid #bbb;
  border-radius: .3rem; padding: 0 .35rem; font-size: .8rem; }
.scroll { overflow-x: auto; overflow-wrap: normal; } table { border-collapse: collapse; min-width: 100%; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #ddd; white-space: nowrap;
  font-variant-numeric: tabular-nums; vertical-align: bottom; }
th { color: #555; font-weight: 600; white-space: normal; min-width: 5.5rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; min-width: 0; }
figure { margin: 1.2rem 0 2rem; } img { max-width: 100%; height: auto; display: block; }
figcaption { display: none; color: #555; font-size: .9rem; margin-top: .3rem; }
pre { overflow-x: auto; overflow-wrap: normal; background: #f5f5f5; padding: .8rem; border-radius: 4px;
  font-size: .85rem; }
.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { figcaption { display: block; } }
"""


def html(page: Page) -> str:
    """The report as one HTML file that loads nothing from outside itself."""
    body = "\n".join([*_lead(page), *_evidence(page), *_literature(page), *_repeat(page)])
    return document(f"{page.summary['study']}: {page.question}", body)


def document(title: str, body: str) -> str:
    """A page in the style of all reports; `title` is plain text, `body` HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}</style></head><body>
{body}
</body></html>
"""


_UNIT = re.compile(r"(?<=\d) (?=(?:%|points|ms|kB|steps)(?!\w))")


def _text(text: str) -> str:
    """`text` made plain, with no line break between a number and its unit."""
    return _UNIT.sub("&nbsp;", escape(text))


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph, of the style `kind`."""
    named = f' class="{kind}"' if kind else ""
    return f"<p{named}>{_text(text)}</p>"


def _pill(verdict: str) -> str:
    return f'<p class="pill"><span>{escape(verdict)}</span></p>'


def _lead(page: Page) -> Iterator[str]:
    """The question, the finding with its verdict, where the numbers come from, and the figure to look at."""
    summary = page.summary
    verdict = verdict_of(summary)
    yield f'<p class="soft">{escape(summary["study"])}</p><h1>{escape(page.question)}</h1>'
    yield f'<div class="lead {verdict}">{_pill(verdict)}{paragraph(headline(summary))}</div>'
    yield paragraph(f"{tally(summary['claims'])}. {setting(summary)}.", "soft")
    if is_fast(summary):
        yield paragraph(FAST)
    if summary["design"].get("statement"):
        statement = escape(summary["design"]["statement"])
        yield f"<p><strong>The text says:</strong> {statement}</p>"
    yield from map(figure, page.pictures[:1])


def _evidence(page: Page) -> Iterator[str]:
    summary = page.summary
    if summary["claims"]:
        yield "<h2>Verdicts</h2>"
        yield f'<div class="cards">{"".join(map(_card, summary["claims"]))}</div>'
    yield "<h2>Arms</h2>"
    yield grid(*arm_table(page))
    yield from map(_table, cell_tables(summary))
    if page.pictures[1:]:
        yield "<h2>More figures</h2>"
    yield from map(figure, page.pictures[1:])


def _card(claim: Claim) -> str:
    """A claim with its verdict, effect, interval, seeds and threshold."""
    secondary = "" if claim["primary"] else ' <span class="tag">secondary</span>'
    corrected = "p (Holm)" if claim["primary"] else "p"
    facts = {
        "Measured": comparison_words(claim),
        "95 % interval": interval_words(claim, claim["ci"]),
        "Claimed": threshold_words(claim),
        "Seeds": str(claim["n"]),
        corrected: p_cell(claim["p_holm"]),
    }
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    return (
        f'<article class="card {claim["verdict"]}">{_pill(claim["verdict"])}'
        f"<h3>{escape(claim['name']).replace('_', '_<wbr>')}{secondary}</h3>{paragraph(claim['statement'])}"
        f'<p class="effect">{_text(effect_words(claim, claim["effect"]))}</p>'
        f"<dl>{rows}</dl>{paragraph(conclusion(claim), 'soft')}</article>"
    )


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text that scrolls inside its own box."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _table(table: Table) -> str:
    note = paragraph(table.note, "soft")
    return f"<h3>{escape(table.title)}</h3>{note}{grid(table.header, table.rows)}"


def figure(picture: Picture) -> str:
    """The figure; on a phone also its caption as text, which is small in the picture."""
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{escape(picture.title)}. {escape(picture.caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(picture.caption)}</figcaption></figure>'
    )


def _literature(page: Page) -> Iterator[str]:
    """What was published, and where later work differs."""
    published = published_tables(page.summary)
    if published:
        yield "<h2>Published figures</h2>"
        yield paragraph(
            "Of other data, networks or budgets, beside which the study's own are to be read."
        )
        yield from map(_table, published)
    if page.summary["design"].get("later"):
        yield "<h2>Where later work differs</h2>"
        yield paragraph(page.summary["design"]["later"])


def _repeat(page: Page) -> Iterator[str]:
    tuned = tuned_table(page.summary)
    if tuned is not None:
        yield "<h2>Tuning</h2>"
        yield _table(tuned)
    yield "<h2>Repeat it</h2>"
    command = page.command
    yield f'<pre class="wrap">{escape(command)}</pre>' if command else paragraph(NO_COMMAND)
    yield "<h2>Versions</h2>"
    yield grid(("package", "version"), version_rows(page.summary))
    config = escape(json.dumps(page.config, indent=2))
    yield "<h2>Config</h2>"
    yield f"<details><summary>Everything that decides the numbers</summary><pre>{config}</pre></details>"
