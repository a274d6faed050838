"""From journal records to what is sent to a tracking service: pure functions and the values they return.

A batch of records is folded into one `Update`, whose parts each mean the same however often they are sent. Points carry
the journal's own steps and times; tags and status are the last ones said.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from syncbn.tracking.redact import redact, redact_text

MAX_VALUE = 5900
"""Longest param or tag, in characters; MLflow refuses params above 6000."""

STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""How an `end` record's status is called in MLflow."""


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    step: int
    time_ms: int
    """Milliseconds since the epoch."""


@dataclass(frozen=True)
class ModelFile:
    """A run's network, exported by torch, as its `model` record describes it."""

    file: str
    """Its name in the run's folder."""
    registered: str
    """The name of the registered model that it is a version of."""
    step: int
    dtype: str
    """Of inputs and outputs, as NumPy calls it."""
    input: list[int]
    """Shape of a sample."""
    output: list[int]
    """Shape of what the network makes of one sample."""
    torch: str
    """The version that exported it."""


@dataclass
class Update:
    """What a batch of records says about one run."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    """`RUNNING`, `FINISHED`, `FAILED` or `KILLED`; None where these records say nothing about it."""
    time_ms: int = 0
    """Time of the last record that set the status."""
    model: ModelFile | None = None


def fold(records: Iterable[Mapping[str, Any]]) -> Update:
    """All that `records` say, in order."""
    update = Update()
    for record in records:
        if "metrics" in record:
            update.points += _points(record["metrics"], record["step"], _ms(record))
        elif record.get("event") == "start":
            _start(update, record)
        elif record.get("event") == "restart":
            update.tags["restarts"] = str(record["number"])
            update.tags["restarted_after"] = shorten(redact_text(str(record["reason"])))
        elif record.get("event") == "end":
            _end(update, record)
        elif record.get("event") == "model":
            update.model = ModelFile(**{each.name: record[each.name] for each in fields(ModelFile)})
    return update


def _start(update: Update, record: Mapping[str, Any]) -> None:
    config = record.get("config") or {}
    update.params = flatten(redact(config))
    names = ("config_hash", "git", "attempt", "world_size", "question", "arms", "seeds")
    said = {name: record[name] for name in names if record.get(name) not in (None, "")}
    said |= {"seed": config["seed"]} if "seed" in config and "study" not in config else {}
    said |= {f"version.{name}": text for name, text in (record.get("versions") or {}).items()}
    update.tags |= {name: shorten(as_text(value)) for name, value in redact(said).items()}
    if record.get("git"):
        update.tags["mlflow.source.git.commit"] = str(record["git"])
    if record.get("attempt", 1) > 1:
        update.tags["error"] = ""  # that of the attempt before, until this one ends with its own
    update.status, update.time_ms = "RUNNING", _ms(record)


def _end(update: Update, record: Mapping[str, Any]) -> None:
    update.status = STATUS.get(str(record.get("status")), "FAILED")
    update.time_ms = _ms(record)
    if record.get("error"):
        update.tags["error"] = shorten(redact_text(str(record["error"])))
    summary = record.get("summary") or {}
    if summary.get("seconds") is not None and summary.get("steps") is not None:
        update.points += _points({"seconds": summary["seconds"]}, summary["steps"], _ms(record))


def _points(metrics: Mapping[str, Any], step: int, time_ms: int) -> list[Point]:
    return [Point(key, float(value), int(step), time_ms) for key, value in metrics.items()]


def _ms(record: Mapping[str, Any]) -> int:
    return int(record.get("time", 0) * 1000)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`tree` with dotted keys and short texts for values: `{"a": {"b": 1}}` becomes `{"a.b": "1"}`."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = shorten(as_text(value))
    return flat


def as_text(value: Any) -> str:
    """`value` as a param reads: strings as they are, lists and dicts as JSON, the rest as Python writes them."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)


def shorten(text: str) -> str:
    """`text`, cut at `MAX_VALUE` characters with a note of how long it was."""
    if len(text) <= MAX_VALUE:
        return text
    note = f"... (cut, {len(text)} characters)"
    return text[: MAX_VALUE - len(note)] + note
