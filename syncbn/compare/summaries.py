"""Finished studies as their `summary.json` holds them, read back and looked at before they are trusted.

The decision that shaped the file: what compares, advises or shows reads this one file of a study and no trial, so it
works on a summary that was kept from a machine that is gone. A file that is not what it should be is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from syncbn.compare.reading import Summary
from syncbn.errors import UsageError

_DUE: dict[str, type] = {"study": str, "design": dict, "arms": dict, "claims": list}


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the study in `folder`.

    Raises:
        UsageError: there is none, it is damaged, or it is of a run rather than a study.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no finished study: {path} is missing")
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    complaint = _complaint(summary)
    if complaint:
        raise UsageError(f"{path} is no study's summary: {complaint}")
    return summary


def _complaint(summary: Any) -> str:
    """What `summary` lacks of a study's, or nothing."""
    if not isinstance(summary, dict):
        return "not a JSON object"
    for key, kind in _DUE.items():
        if not isinstance(summary.get(key), kind):
            return f"{key!r} is missing"
    seeds = summary["design"].get("seeds")
    if not isinstance(seeds, list):
        return "design.seeds is missing"
    for arm, metrics in summary["arms"].items():
        for metric, values in metrics.items():
            if not isinstance(values, list) or len(values) != len(seeds):
                return f"{metric!r} of arm {arm!r} is no list of one value a seed ({len(seeds)})"
    return ""


def by_seed(summary: Summary, arm: str, metric: str) -> dict[int, float | None]:
    """Seed to value of an arm's metric, None where it was censored or not finite; empty where it was not measured."""
    values = summary["arms"].get(arm, {}).get(metric)
    return {} if values is None else dict(zip(summary["design"]["seeds"], values, strict=True))
