"""The report as Markdown, for a repository or an issue; figures are links into `figures/`.

It has the sections of the HTML page in the same order.
"""

import json
from collections.abc import Iterator

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
    CLAIM_HEADER,
    Table,
    cell_tables,
    claim_rows,
    published_tables,
    tuned_table,
    version_rows,
)
from syncbn.compare.report.words.claims import tally, verdict_sentence
from syncbn.compare.report.words.study import setting
from syncbn.compare.report.words.text import escaped, markdown_table


def markdown(page: Page) -> str:
    """The report as Markdown."""
    return "\n\n".join([*_lead(page), *_evidence(page), *_literature(page), *_repeat(page)]) + "\n"


def _lead(page: Page) -> Iterator[str]:
    """The question, the finding with its verdict, where the numbers come from, and the figure to look at."""
    summary = page.summary
    yield f"# {escaped(summary['study'])}: {escaped(page.question)}"
    yield f"**{verdict_of(summary)}.** {escaped(headline(summary))}"
    yield f"{tally(summary['claims'])}. {escaped(setting(summary))}."
    if is_fast(summary):
        yield FAST
    if summary["design"].get("statement"):
        yield f"The text says: {escaped(summary['design']['statement'])}"
    yield from map(_picture, page.pictures[:1])


def _evidence(page: Page) -> Iterator[str]:
    summary = page.summary
    yield "## Verdicts"
    yield markdown_table(CLAIM_HEADER, claim_rows(summary))
    if summary["claims"]:
        yield "\n".join(
            f"- **{escaped(claim['name'])}**{'' if claim['primary'] else ' (secondary)'}. "
            f"{escaped(claim['statement'])} {escaped(verdict_sentence(claim))}"
            for claim in summary["claims"]
        )
    yield "## Arms"
    yield markdown_table(*arm_table(page))
    for table in cell_tables(summary):
        yield _table(table)
    if page.pictures[1:]:
        yield "## More figures"
    yield from map(_picture, page.pictures[1:])


def _picture(picture: Picture) -> str:
    return f"![{escaped(picture.title)}](figures/{picture.name}.png)"


def _table(table: Table) -> str:
    title = f"**{escaped(table.title)}**. {escaped(table.note)}"
    return f"{title}\n\n{markdown_table([*map(escaped, table.header)], table.rows)}"


def _literature(page: Page) -> Iterator[str]:
    """What was published, and where later work differs."""
    published = published_tables(page.summary)
    if published:
        yield "## Published figures"
        yield "Of other data, networks or budgets, beside which the study's own are to be read."
        yield from map(_table, published)
    if page.summary["design"].get("later"):
        yield "## Where later work differs"
        yield escaped(page.summary["design"]["later"])


def _repeat(page: Page) -> Iterator[str]:
    tuned = tuned_table(page.summary)
    if tuned is not None:
        yield "## Tuning"
        yield _table(tuned)
    yield "## Repeat it"
    yield f"```\n{page.command}\n```" if page.command else NO_COMMAND
    yield "## Versions"
    yield markdown_table(("package", "version"), version_rows(page.summary))
    yield "## Config"
    yield f"```json\n{json.dumps(page.config, indent=2)}\n```"
