"""A comparison of two launches in words, and as values for JSON."""

from dataclasses import asdict
from typing import Any

from syncbn.compare.regression import Change, Regression
from syncbn.compare.report.words.claims import effect_words, interval_words
from syncbn.compare.report.words.numbers import NOTHING, p_cell, value_words
from syncbn.compare.report.words.text import aligned
from syncbn.compare.study.summary import finite

HEADER = ("arm", "verdict", "metric", "base", "new", "change", "95 % interval", "seeds", "p (Holm)")


def text(regression: Regression, differences: list[str]) -> str:
    """A table of arms, what follows for the claims, and one line to end with."""
    lines = [f"  {line}" for line in differences]
    notes = [f"  {c.arm}: {c.note}" for c in regression.changes if c.note]
    claims = [
        f"  claim {c.name}: REPRODUCED -> {c.verdict}" + (f" ({c.note})" if c.note else "")
        for c in regression.claims
    ]
    return "\n".join(
        [
            f"{regression.study}: new against base, paired over {len(regression.seeds)} seeds",
            *lines,
            "",
            aligned(HEADER, [_row(change) for change in regression.changes]),
            *notes,
            *claims,
            "",
            conclusion(regression),
        ]
    )


def conclusion(regression: Regression) -> str:
    """Whether anything got worse, in one line."""
    margin = f"beyond a margin of {regression.margin:g}" if regression.margin else "beyond noise"
    if regression.worse:
        return f"WORSE {margin}: {'; '.join(regression.worse)}"
    return f"Nothing got worse {margin}."


def _row(change: Change) -> tuple[str, ...]:
    entry, measure = to_entry(change), change.measure
    claim = {"measure": asdict(measure), "scale": "difference", "against": "base", "along": []}
    return (
        change.arm,
        change.verdict,
        measure.words,
        value_words(measure, change.base),
        value_words(measure, change.new),
        effect_words(claim, entry["effect"]),
        interval_words(claim, entry["ci"]),
        str(change.n),
        p_cell(change.p_holm) if change.n > 1 else NOTHING,
    )


def to_dict(regression: Regression, differences: list[str]) -> dict[str, Any]:
    """The comparison as values that JSON has; what is not finite is None."""
    return {
        "study": regression.study,
        "worse": bool(regression.worse),
        "conclusion": conclusion(regression),
        "margin": regression.margin,
        "seeds": regression.seeds,
        "differences": differences,
        "changes": [to_entry(change) for change in regression.changes],
        "claims": [asdict(claim) for claim in regression.claims],
    }


def to_entry(change: Change) -> dict[str, Any]:
    """One arm and metric, the interval under `ci` as in a study's summary."""
    return {
        "arm": change.arm,
        "metric": change.metric.name,
        "lower_is_better": change.metric.lower_is_better,
        "verdict": change.verdict,
        "base": change.base,
        "new": change.new,
        "effect": finite(change.effect),
        "ci": [finite(change.interval.low), finite(change.interval.high)],
        "n": change.n,
        "p_holm": change.p_holm,
        "note": change.note,
    }
