"""Where a run lies, and the config that it was trained with: its files alone, without torch."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncbn.compose import compose, recorded_config
from syncbn.config import Config
from syncbn.errors import CheckpointError, UsageError
from syncbn.extensions import load_extensions
from syncbn.tracking.journal import read_journal

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Found:
    """A run's folder, its config, and the ranks that trained it last."""

    folder: Path
    config: Config
    num_ranks: int


def find(run: str) -> Found:
    """The run that `run` names: its folder, or its name under `runs_dir`; its extensions are imported.

    Raises:
        UsageError: there is no such run (with the nearest name), or its config cannot be used here any more.
        CheckpointError: its journal is damaged.
    """
    folder = _folder(run)
    start = _last_start(folder / JOURNAL)
    tree = start["config"]
    try:
        load_extensions(tree.get("extensions") or [])
        config = recorded_config(tree)
    except UsageError as error:
        raise UsageError(f"run {folder}: {error}") from error
    return Found(folder, config, int(start["world_size"]))


def _folder(run: str) -> Path:
    given = Path(run).expanduser()
    runs_dir = Path(compose(()).runs_dir)
    for folder in (given, runs_dir / run):
        if (folder / JOURNAL).is_file():
            return folder
    for folder in (given, runs_dir / run):
        if folder.is_dir():
            raise UsageError(f"{folder} is no run: {_instead(folder)}")
    if given.is_file():
        raise UsageError(f"{given} is a file: give a run's folder, or its name under {runs_dir}")
    raise UsageError(f"there is no run {run!r} in {runs_dir}{_nearest(given.name, runs_dir)}")


def _instead(folder: Path) -> str:
    """What to give in place of a folder without a journal."""
    trials = sorted(path.parent for path in folder.glob(f"trials/*/{JOURNAL}"))
    if trials:
        return f"it is a study or a sweep, give one of its trials, such as {trials[0]}"
    return f"it holds no {JOURNAL}"


def _nearest(name: str, runs_dir: Path) -> str:
    known = sorted(path.parent.name for path in runs_dir.glob(f"*/{JOURNAL}"))
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f": one of {', '.join(known[:10])}" if known else ", which holds no run"


def _last_start(journal: Path) -> dict[str, Any]:
    """The record with which the latest attempt began."""
    try:
        starts = [record for record in read_journal(journal) if record.get("event") == "start"]
        newest = starts[-1]
        if not isinstance(newest["config"], dict):
            raise TypeError("its config is no mapping")
        int(newest["world_size"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{journal} is damaged: no start record with a config can be read ({type(error).__name__})"
        ) from error
    return newest
