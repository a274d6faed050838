"""Files and folders that are there completely or not at all, also after a kill, a full disk or a power cut.

Everything is written beside its place under a `.tmp-` name, synced to the disk, renamed, and then the folder that
holds it is synced: a rename is atomic, but only a synced folder remembers it. What a killed writer leaves behind
starts with `.tmp-`, is read by nobody, and goes with the next `sweep`.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

_TEMPORARY = ".tmp-"


def write_folder(target: Path, blobs: Mapping[str, bytes | memoryview]) -> None:
    """Make the folder `target` with exactly the files `blobs`.

    A folder that already has this name stays, as `<name>.old`, until the new one is in place, and longer where
    this process dies between the two.
    """
    beside = target.with_name(_TEMPORARY + target.name)
    beside.mkdir()
    for name, blob in blobs.items():
        _write(beside / name, blob)
    _sync_folder(beside)
    old = target.with_name(target.name + ".old")
    if target.exists():
        discard(old)
        target.rename(old)
    beside.rename(target)
    _sync_folder(target.parent)
    discard(old)


def write_file(target: Path, blob: bytes) -> None:
    """Make or replace the file `target`."""
    beside = target.with_name(_TEMPORARY + target.name)
    _write(beside, blob)
    beside.replace(target)
    _sync_folder(target.parent)


def discard(path: Path) -> None:
    """Remove the folder `path` where it exists; half removed, it would pass for a damaged one, so it moves first."""
    if path.exists():
        beside = path.with_name(f"{_TEMPORARY}gone-{path.name}")
        path.rename(beside)
        shutil.rmtree(beside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what writers that failed or were killed left in `folder`; the only writer may call it."""
    for left in folder.glob(_TEMPORARY + "*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _write(path: Path, blob: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
