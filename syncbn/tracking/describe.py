"""What a study's MLflow run says at its end, taken from the files of the study.

The verdicts are written where a reader of MLflow looks first - the run's description, and a tag a claim, which is a
column of the run table - because MLflow itself compares by averages, without intervals or pairing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from syncbn.tracking.update import Point, Update, shorten


def closing_words(folder: Path, time_ms: int) -> Update:
    """Description, verdict tags, median test errors and effects of the study in `folder`; nothing without results.

    Args:
        folder: the study's folder, with `summary.json` and `report.md`.
        time_ms: when the numbers are said to be from; milliseconds since the epoch.
    """
    if not (folder / "summary.json").is_file():
        return Update()
    summary = json.loads((folder / "summary.json").read_text())
    tags = {"mlflow.note.content": note((folder / "report.md").read_text())}
    tags |= {"git": str(summary["git"])} if summary["git"] else {}
    tags |= {f"version.{name}": str(text) for name, text in summary["versions"].items()}
    tags |= {f"claim.{claim['name']}": claim["verdict"] for claim in summary["claims"]}
    step = int(summary["design"]["steps"])
    points = [Point(key, value, step, time_ms) for key, value in headline(summary).items()]
    return Update(tags=tags, points=points)


def sweep_words(folder: Path, time_ms: int) -> Update:
    """Description, best trial and its measure of the sweep in `folder`; nothing without results.

    Args:
        folder: the sweep's folder, with `summary.json` and `report.md`.
        time_ms: when the numbers are said to be from; milliseconds since the epoch.
    """
    if not (folder / "summary.json").is_file():
        return Update()
    summary = json.loads((folder / "summary.json").read_text())
    failed = sum(trial["exit_code"] != 0 for trial in summary["trials"])
    tags = {"mlflow.note.content": note((folder / "report.md").read_text())}
    tags |= {"trials": str(len(summary["trials"])), "failed": str(failed)}
    if summary["best"] is None:
        return Update(tags=tags)
    best = next(trial for trial in summary["trials"] if trial["name"] == summary["best"])
    measure = summary["measure"]["name"]
    point = Point(f"best/{measure}", best["final"][measure], int(best["steps"]), time_ms)
    return Update(tags=tags | {"best": shorten(best["overrides"])}, points=[point])


def note(report: str) -> str:
    """The part of a markdown report before its figures, which a description cannot show, and where those are."""
    words = report.split("\n## Figures")[0].rstrip()
    return shorten(
        f"{words}\n\nFigures, report and numbers: *Artifacts*. Trials: the *child runs*."
    )


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Median of what the task decides by an arm, and the effect a claim, under their names in MLflow."""
    values: dict[str, float] = {}
    metric = summary["design"].get("decides") or "test_error"
    for arm, measured in summary["arms"].items():
        errors = [error for error in measured.get(metric, []) if error is not None]
        if errors:
            values[f"{metric}/{arm}"] = median(errors)
    for claim in summary["claims"]:
        if claim["effect"] is not None:
            values[f"effect/{claim['name']}"] = claim["effect"]
    return values
