"""A run's checkpoints on disk: one folder each, complete or absent.

    checkpoints/LATEST            the name of the newest checkpoint, replaced last
    checkpoints/BEST              the name of the one with the lowest test error, where a run keeps it
    checkpoints/step-000123/      model.safetensors, state.pt, meta.json, manifest.json (`format`)

A save never touches what is already there before the new checkpoint is on the disk under its name, so a kill or a full
disk at any moment leaves the one before it as it was. One job may write a run folder at a time (`runlock`).
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.checkpoint import durable, format
from syncbn.checkpoint.format import Meta
from syncbn.errors import CheckpointError
from syncbn.kept_checkpoint import BEST, LATEST

_NAME = re.compile(r"step-(\d{6,})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, on the CPU."""

    path: Path
    meta: Meta
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    extra: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What the reader should be told: which newer checkpoints were passed over, and why."""


def save(
    folder: Path,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    meta: Meta,
    keep: int = 2,
    extra: Mapping[str, Any] | None = None,
    best: int | None = None,
) -> Path:
    """Write a checkpoint of `meta.step` into `folder` and make it the latest.

    Args:
        folder: the run's `checkpoints` folder, made where it is missing; one writer at a time.
        model_state: a module's state_dict; tensors that share memory are written once per name.
        optimizer_state: an optimiser's state_dict.
        meta: where the run stands.
        keep: whole checkpoints left in `folder`, the newest first; later steps than `meta.step` belong to
            an abandoned attempt and go.
        extra: plain tensors and containers to get back with it.
        best: the step, up to `meta.step`, of a checkpoint that is kept beside these, and that `BEST` names.

    Returns:
        The checkpoint's folder, on disk when this returns.

    Raises:
        CheckpointError: it could not be written (the one before stays, no temporary file does), or a state
            holds something that could not be read back.
    """
    blobs = format.encode(model_state, optimizer_state, extra or {}, meta)
    target = folder / _name(meta.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        durable.sweep(folder)
        durable.write_folder(target, blobs)
        durable.write_file(folder / LATEST, f"{target.name}\n".encode())
        if best is not None and (folder / _name(best)).exists():
            durable.write_file(folder / BEST, f"{_name(best)}\n".encode())
        else:
            (folder / BEST).unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            durable.sweep(folder)
        raise CheckpointError(f"cannot save checkpoint {target}: {error.strerror}") from error
    _prune(folder, meta.step, keep, best)
    return target


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`, or None where no run has saved one yet.

    `LATEST` decides; where it or the checkpoint it names is damaged, the newest other whole one is taken and
    `Checkpoint.notes` says what was passed over and why.

    Raises:
        CheckpointError: something was saved here, and nothing of it is whole.
    """
    try:
        candidates, notes = _candidates(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    for candidate in candidates:
        try:
            return replace(load(candidate), notes=tuple(notes))
        except CheckpointError as error:
            notes.append(str(error))
    if notes:
        raise CheckpointError(f"no whole checkpoint in {folder}: {'; '.join(notes)}")
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`.

    Raises:
        CheckpointError: a file of it is missing, empty, truncated, damaged, not plain data, or of another step.
    """
    meta, model_state, state = format.decode(path, format.read_verified(path))
    if meta.step != _step_of(path):
        raise CheckpointError(f"{path} holds step {meta.step}: it was swapped or renamed")
    return Checkpoint(path, meta, model_state, state["optimizer"], state["extra"])


def _candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Folders to try in turn, the one that `LATEST` names first, and what is odd about them."""
    saved = _saved(folder)
    try:
        name = (folder / LATEST).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return saved, [f"{folder / LATEST} is missing"] if saved else []
    except OSError as error:
        return saved, [f"{folder / LATEST} cannot be read: {error.strerror}"]
    if not _NAME.fullmatch(name):
        return saved, [f"{folder / LATEST} names no checkpoint: {name[:40]!r}"]
    named = folder / name
    notes = [
        f"{path} is newer than {LATEST} ({name}): a save was cut short, or {LATEST} is damaged"
        for path in saved
        if _step_of(path) > _step_of(named)
    ]
    return [named, *(path for path in saved if path != named)], notes


def _saved(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first, a replaced one after the one that replaced it."""
    names = [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return [folder / name for name in sorted(names, key=_order, reverse=True)]


def _order(name: str) -> tuple[int, bool]:
    return _step_of(Path(name)), not name.endswith(".old")


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name is not step-000123")
    return int(match.group(1))


def load_best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the lowest test error, or None where the run keeps none (`train.keep_best`).

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        name = (folder / BEST).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return load(folder / name)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` whole checkpoints up to `step`, just written, and that of the step `best`.

    A damaged one does not count, or the only good one could go. Failing to remove loses nothing.
    """
    num_kept = 0
    for path in _saved(folder):
        fresh = path.name == _name(step)
        if _step_of(path) <= step and num_kept < keep and (fresh or _is_whole(path)):
            num_kept += 1
        elif best is None or path.name != _name(best):
            with contextlib.suppress(OSError):
                durable.discard(path)


def _is_whole(path: Path) -> bool:
    try:
        format.read_verified(path)
    except CheckpointError:
        return False
    return True
