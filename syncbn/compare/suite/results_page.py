"""The generated part of docs/results.md: every claim of every study, and the first figure of each report.

Each study corrects for its own primary claims (Holm). The page corrects a second time, over the primary claims of all
studies together, and says which verdicts that would change. It changes none, because what a claim is corrected for was
declared before it ran. The text is made by pure functions; `write_page` reads summaries and writes page and figures.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncbn.compare.report.words.claims import (
    comparison_words,
    effect_words,
    interval_words,
    overall,
    threshold_words,
)
from syncbn.compare.report.words.numbers import p_cell, time_words
from syncbn.compare.report.words.study import setting
from syncbn.compare.report.words.text import counted, escaped, markdown_table
from syncbn.compare.statistics import significance
from syncbn.compare.statistics.claims import LEVEL, REPRODUCED, VERDICTS
from syncbn.compare.study.summary import Summary, read_summary
from syncbn.compare.suite import ledger
from syncbn.compare.suite.tiers import Launch
from syncbn.errors import UsageError
from syncbn.marked import insert

BEGIN = "<!-- begin: written by `syncbn studies --show` -->"
END = "<!-- end: written by `syncbn studies --show` -->"

OVERVIEW = ("study", "asks", "primary claims", *map(str.lower, VERDICTS), "time")
CLAIMS = ("claim", "verdict", "effect", "95 % interval", "seeds", "claimed", "p (Holm)", "of what")


@dataclass(frozen=True)
class FinishedStudy:
    """A finished study, and what the page needs beside its summary."""

    summary: Summary
    question: str
    seconds: float
    figure: str | None
    """Path of its figure from the page, None where it has none."""


@dataclass(frozen=True)
class CorrectedClaim:
    """A primary claim, corrected over those of all studies."""

    study: str
    claim: str
    p: float
    """After Holm's correction over the primary claims of all studies."""


def generated(studies: Sequence[FinishedStudy], missing: Sequence[str] = ()) -> str:
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


def _origin(studies: Sequence[FinishedStudy], missing: Sequence[str]) -> str:
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


def _overview(study: FinishedStudy) -> tuple[str, ...]:
    claims = study.summary["claims"]
    counts = (str(sum(c["verdict"] == word for c in claims)) for word in VERDICTS)
    return (
        study.summary["study"],
        study.question,
        overall(claims),
        *counts,
        time_words(study.seconds),
    )


def second_look(summaries: Sequence[Summary]) -> list[CorrectedClaim]:
    """The primary claims of all studies, corrected together, in their order."""
    primary = [
        (summary["study"], claim)
        for summary in summaries
        for claim in summary["claims"]
        if claim["primary"]
    ]
    corrected = significance.holm([1.0 if c["p"] is None else c["p"] for _, c in primary])
    return [
        CorrectedClaim(study, claim["name"], p)
        for (study, claim), p in zip(primary, corrected, strict=True)
    ]


def overturned(summaries: Sequence[Summary]) -> list[CorrectedClaim]:
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


def _section(study: FinishedStudy) -> list[str]:
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


MOST_BYTES = 100_000
_COLOURS = (128, 64, 32)


def write_page(launches: Sequence[Launch], runs_dir: Path, page: Path) -> dict[str, Any]:
    """Rewrite what stands between the markers of `page` from the studies that are finished in `runs_dir`.

    Returns:
        What the page shows: its studies, those that are missing, and claims that a second look would overturn.

    Raises:
        UsageError: no study is finished, or `page` is missing or has no markers.
    """
    finished = [
        launch for launch in launches if (runs_dir / launch.name / "summary.json").is_file()
    ]
    if not finished:
        names = ", ".join(launch.name for launch in launches)
        raise UsageError(f"no study is finished in {runs_dir}: looked for {names}")
    if not page.is_file():
        raise UsageError(f"page {page} is missing: give --page, or start in the project's folder")
    missing = [launch.name for launch in launches if launch not in finished]
    entries = ledger.read(runs_dir)
    shown = [_shown(launch, runs_dir, page.parent, entries) for launch in finished]
    try:
        text = insert(page.read_text(), BEGIN, END, generated(shown, missing))
    except ValueError as error:
        raise UsageError(f"{page}: {error}") from error
    page.write_text(text)
    return {
        "page": str(page),
        "studies": [launch.name for launch in finished],
        "missing": missing,
        "overturned": [asdict(claim) for claim in overturned([s.summary for s in shown])],
    }


def _shown(
    launch: Launch, runs_dir: Path, docs: Path, entries: Mapping[str, ledger.Entry]
) -> FinishedStudy:
    folder = runs_dir / launch.name
    figure = copy_first(folder, launch.name, docs / "figures")
    return FinishedStudy(
        summary=read_summary(folder),
        question=launch.question,
        seconds=entries.get(launch.name, {}).get("seconds", 0.0),
        figure=None if figure is None else f"figures/{figure.name}",
    )


def copy_first(study: Path, name: str, folder: Path) -> Path | None:
    """Copy the first figure of the report in `study` to `folder` as result_<name>.png; None where there is none."""
    source = first_figure(study)
    if source is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"result_{name}.png"
    target.write_bytes(slim(source.read_bytes()))
    return target


def first_figure(study: Path) -> Path | None:
    """The figure that the report in `study` shows first."""
    report = study / "report.md"
    named = (
        re.findall(r"\(figures/([\w.-]+\.png)\)", report.read_text()) if report.is_file() else []
    )
    files = [study / "figures" / figure for figure in named]
    return next((file for file in files if file.is_file()), None)


def slim(png: bytes) -> bytes:
    """`png`, with fewer colours where it has more than `MOST_BYTES`."""
    from PIL import Image

    smallest = png
    for colours in _COLOURS:
        if len(smallest) <= MOST_BYTES:
            break
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        picture.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        smallest = min(smallest, buffer.getvalue(), key=len)
    return smallest
