"""Which checkpoint of a run stands for it, wherever a trained run is used; files alone, no tensor is read.

One rule for `model.weights`, `syncbn evaluate`, `predict` and `export` and for logged models: the one that did best,
where the run keeps it (`train.keep_best`), else the newest that is whole.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from syncbn.errors import CheckpointError

LATEST, BEST = "LATEST", "BEST"
"""Files in a run's folder of checkpoints that name one of them."""


@dataclass(frozen=True)
class Kept:
    """A whole checkpoint: its folder, and the sha256 of its manifest, which holds those of its files."""

    path: Path
    sha256: str


def kept_checkpoint(folder: Path) -> Kept | None:
    """The checkpoint of the run in `folder` by the rule above; None where nothing whole has been saved.

    Raises:
        CheckpointError: the best one is damaged, in whose place no other is taken.
    """
    saved = folder / "checkpoints"
    if (best := _named(saved, BEST)) is not None:
        found = whole(best)
        if found is None:
            raise CheckpointError(
                f"{best}, the best checkpoint of {folder}, is damaged: ask for another, --checkpoint latest or "
                "model.weights=FOLDER of one"
            )
        return found
    latest = _named(saved, LATEST)
    candidates = [*([latest] if latest else []), *sorted(saved.glob("step-*"), reverse=True)]
    return next((found for path in candidates if (found := whole(path)) is not None), None)


def whole(path: Path) -> Kept | None:
    """The checkpoint in the folder `path`; None where there is none, or one of its files is not as it was written."""
    try:
        text = (path / "manifest.json").read_bytes()
        entries = {name: entry["sha256"] for name, entry in json.loads(text).items()}
        fits = all(sha256_of(path / name) == sha256 for name, sha256 in entries.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return Kept(path, hashlib.sha256(text).hexdigest()) if fits and entries else None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(saved: Path, pointer: str) -> Path | None:
    """The checkpoint that `LATEST` or `BEST` names."""
    try:
        return saved / (saved / pointer).read_text(errors="replace").strip()[:100]
    except OSError:
        return None
