"""The generated part of docs/results.md: every claim of every study, from their summaries, by pure functions.

The decision that shaped the file: each study pays for its own primary claims (Holm). A reader of all of them sees more,
so the page looks a second time, corrected over the primary claims of all studies together, and says which verdicts that
would change; it changes none itself, because what a claim pays for was declared before it ran.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.compare import statistics
from syncbn.compare.captions import setting
from syncbn.compare.claim_words import (
    VERDICTS,
    comparison_words,
    effect_words,
    interval_words,
    overall,
    threshold_words,
)
from syncbn.compare.claims import LEVEL, REPRODUCED
from syncbn.compare.ledger import time_words
from syncbn.compare.plain import counted, escaped, markdown_table, p_cell
from syncbn.compare.reading import Summary

BEGIN = "<!-- begin: written by `syncbn studies --show` -->"
END = "<!-- end: written by `syncbn studies --show` -->"

OVERVIEW = ("study", "asks", "primary claims", *map(str.lower, VERDICTS), "time")
CLAIMS = ("claim", "verdict", "effect", "95 % interval", "seeds", "claimed", "p (Holm)", "of what")


@dataclass(frozen=True)
class Shown:
    """A finished study, and what the page needs beside its summary."""

    summary: Summary
    question: str
    seconds: float
    figure: str | None
    """Path of its figure from the page, None where it has none."""


@dataclass(frozen=True)
class Second:
    """A primary claim, corrected over those of all studies."""

    study: str
    claim: str
    p: float
    """After Holm's correction over the primary claims of all studies."""


def generated(studies: Sequence[Shown], missing: Sequence[str] = ()) -> str:
    """All that is shown of `studies`: an overview, the second look, and a section each.

    Args:
        studies: finished ones, in order.
        missing: names of those that are not, which the page must not hide.
    """
    summaries = [study.summary for study in studies]
    return "\n\n".join(
        [
            _origin(studies, missing),
            markdown_table(OVERVIEW, [_overview(study) for study in studies]),
            second_look_words(summaries),
            *(part for study in studies for part in _section(study)),
        ]
    )


def _origin(studies: Sequence[Shown], missing: Sequence[str]) -> str:
    """Where the numbers come from, and what is not among them."""
    revisions = _each(study.summary["git"] for study in studies)
    torch = _each(study.summary["versions"].get("torch", "?") for study in studies)
    took = time_words(sum(study.seconds for study in studies))
    absent = f" Not finished: {', '.join(missing)}." if missing else ""
    return (
        f"{counted(len(studies), 'study', 'studies')}, revision {', '.join(f'`{r}`' for r in revisions)}, "
        f"torch {', '.join(torch)}; {took} in all.{absent}"
    )


def _each(listed: Iterable[str]) -> list[str]:
    """Every name once, of texts that may list several: a study's trials need not share a revision."""
    return sorted({name for text in listed for name in text.split(", ")})


def _overview(study: Shown) -> tuple[str, ...]:
    claims = study.summary["claims"]
    counts = (str(sum(c["verdict"] == word for c in claims)) for word in VERDICTS)
    return (
        study.summary["study"],
        study.question,
        overall(claims),
        *counts,
        time_words(study.seconds),
    )


def second_look(summaries: Sequence[Summary]) -> list[Second]:
    """The primary claims of all studies, corrected together, in their order."""
    primary = [
        (summary["study"], claim)
        for summary in summaries
        for claim in summary["claims"]
        if claim["primary"]
    ]
    corrected = statistics.holm([1.0 if c["p"] is None else c["p"] for _, c in primary])
    return [
        Second(study, claim["name"], p)
        for (study, claim), p in zip(primary, corrected, strict=True)
    ]


def overturned(summaries: Sequence[Summary]) -> list[Second]:
    """The claims counted as reproduced that would not be, corrected over all studies together."""
    verdicts = {(s["study"], c["name"]): c["verdict"] for s in summaries for c in s["claims"]}
    return [
        claim
        for claim in second_look(summaries)
        if verdicts[claim.study, claim.claim] == REPRODUCED and claim.p > LEVEL
    ]


def second_look_words(summaries: Sequence[Summary]) -> str:
    """What the second look says, in a paragraph."""
    number, changed = len(second_look(summaries)), overturned(summaries)
    claims = counted(number, "primary claim", "primary claims")
    opening = f"**A second look.** Corrected over the {claims} of all studies together (Holm),"
    if not changed:
        return f"{opening} every reproduced claim stays reproduced."
    names = ", ".join(f"`{c.claim}` of {c.study} (p = {c.p:.3f})" for c in changed)
    return f"{opening} {len(changed)} would be inconclusive: {names}."


def _section(study: Shown) -> list[str]:
    """A study's part of the page."""
    summary = study.summary
    design = summary["design"]
    claims = summary["claims"]
    parts = [f"### {summary['study']}", escaped(study.question)]
    parts += [f"The statement: {escaped(design['statement'])}"] if design.get("statement") else []
    parts += [f"{escaped(setting(summary))}."]
    if claims:
        parts += [markdown_table(CLAIMS, [_claim(claim) for claim in claims])]
        parts += ["\n".join(_stated(claim) for claim in claims if claim["statement"])]
    parts += [f"![{escaped(study.question)}]({study.figure})"] if study.figure else []
    parts += [f"Later work: {escaped(design['later'])}"] if design.get("later") else []
    return [part for part in parts if part]


def _claim(claim: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the claims' table; a secondary claim is said to be one."""
    return (
        claim["name"] + ("" if claim["primary"] else " (secondary)"),
        claim["verdict"],
        effect_words(claim, claim["effect"]),
        interval_words(claim, claim["ci"]),
        str(claim["n"]),
        threshold_words(claim),
        p_cell(claim["p_holm"]),
        comparison_words(claim),
    )


def _stated(claim: Mapping[str, Any]) -> str:
    note = f" ({escaped(claim['note'])})" if claim["note"] else ""
    return f"- {escaped(claim['name'])}: {escaped(claim['statement'])}{note}"
