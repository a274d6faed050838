"""The content of a report, before it is rendered as Markdown or HTML, and its headline.

The finding comes first, as one sentence made from the first claim's numbers, with the verdict beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from syncbn.compare.measure import primary_of
from syncbn.compare.report.figures.canvas import Picture
from syncbn.compare.report.figures.dots import steps_title
from syncbn.compare.report.tables import arm_header, arm_rows
from syncbn.compare.report.words.claims import finding, overall
from syncbn.compare.report.words.study import contrast_title
from syncbn.compare.study.summary import Summary, median_of

NO_COMMAND = "No file in conf/study/ asks this question; the config below is the whole study."
FAST = (
    "This is the fast tier: fewer seeds or steps than the study proper, to see that everything works. What takes the "
    "full budget to show is not judged here."
)


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


def headline(summary: Summary) -> str:
    """The finding in one sentence: the first primary claim's, else the contrast of the study's primary metric."""
    claims = sorted(summary["claims"], key=lambda claim: not claim["primary"])
    if not claims:
        return f"{contrast_title(summary, primary_of(summary))}."
    metric = claims[0]["metric"]
    if claims[0]["effect"] is None and metric == "steps_to_target":
        return f"{steps_title(summary)}."
    medians = {arm: median_of(summary, arm, metric) for arm in summary["arms"]}
    return finding(claims[0], medians)


def arm_table(page: Page) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the arms, each with the settings that make it, as its study declares them."""
    declared: Mapping[str, Sequence[str]] = (page.config.get("study") or {}).get("arms") or {}
    header, rows = list(arm_header(page.summary)), [list(row) for row in arm_rows(page.summary)]
    if not declared:
        return header, rows
    settings = [shorten(" ".join(declared.get(row[0], ())), 70) for row in rows]
    return [*header, "settings"], [[*row, own] for row, own in zip(rows, settings, strict=True)]


def verdict_of(summary: Summary) -> str:
    """The study's verdict in a word."""
    return overall(summary["claims"])


def is_fast(summary: Summary) -> bool:
    """Whether the study ran in its fast tier."""
    return summary["design"].get("tier") == "fast"
