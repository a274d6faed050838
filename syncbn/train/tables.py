"""Measures that are no single number, as files of the run: `measures/<name>.json`."""

import json
from pathlib import Path
from typing import Any


def write_tables(folder: Path, step: int, tables: dict[str, Any]) -> None:
    """Write each of `tables`, nested lists by name, as measured at `step`; whole or not at all."""
    if tables:
        folder.mkdir(parents=True, exist_ok=True)
    for name, values in tables.items():
        beside = folder / f".{name}.json"
        beside.write_text(json.dumps({"step": step, "values": values}) + "\n")
        beside.replace(folder / f"{name}.json")
