"""What a study's MLflow run says at its end, taken from `summary.json`.

The decision: the verdicts are written where a reader of MLflow looks first - the run's description, and a tag a claim,
which is a column of the run table - because MLflow itself compares by averages, without intervals or pairing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from syncbn.tracking.update import Point, Update, shorten


def closing_words(folder: Path, time_ms: int) -> Update:
    """Description, verdict tags and mean test errors of the study in `folder`; nothing without a summary."""
    file = folder / "summary.json"
    if not file.is_file():
        return Update()
    summary = json.loads(file.read_text())
    tags = {"mlflow.note.content": shorten(describe(summary)), "git": str(summary.get("git", ""))}
    tags |= {f"claim.{claim['name']}": str(claim["verdict"]) for claim in summary["claims"]}
    step = int(summary["design"]["steps"])
    points = [Point(key, value, step, time_ms) for key, value in headline(summary).items()]
    return Update(tags=tags, points=points)


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Mean test error an arm, and the effect a claim, under the names that they have in MLflow."""
    values: dict[str, float] = {}
    for arm, measured in summary["arms"].items():
        if errors := _numbers(measured.get("test_error", [])):
            values[f"test_error/{arm}"] = fmean(errors)
    for claim in summary["claims"]:
        if claim.get("effect") is not None:
            values[f"effect/{claim['name']}"] = float(claim["effect"])
    return values


def describe(summary: Mapping[str, Any]) -> str:
    """The study in markdown: its claims with intervals and verdicts, its arms, and where the figures are."""
    design = summary["design"]
    facts = ", ".join(
        f"{key} {value}" for key, value in design.items() if not isinstance(value, list)
    )
    parts = [
        f"## {summary['study']}",
        f"{facts}, seeds {', '.join(map(str, design['seeds']))}",
        _claims(summary["claims"]),
        _arms(summary["arms"]),
        "Figures, the full report and the numbers are under *Artifacts*; the trials are this run's child runs.",
    ]
    return "\n\n".join(part for part in parts if part)


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"**{claim['verdict']}**",
            claim.get("statement") or claim["name"],
            _signed(claim.get("effect")),
            f"{_signed(claim['ci'][0])} to {_signed(claim['ci'][1])}",
            _signed(claim.get("threshold")),
        ]
        for claim in claims
    ]
    return _table(["verdict", "claim", "effect", "95 % interval", "threshold"], rows)


def _arms(arms: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for arm, measured in arms.items():
        errors = _numbers(measured.get("test_error", []))
        spread = f"{min(errors):.4f} to {max(errors):.4f}" if errors else "-"
        mean = f"{fmean(errors):.4f}" if errors else "-"
        rows.append([arm, mean, spread, str(len(errors))])
    return _table(["arm", "mean test error", "over seeds", "trials"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines: Iterable[Sequence[str]] = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
