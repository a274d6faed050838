"""Checks on folders and files before anything is parsed, each failing with one line that says what to do."""

import os
from collections.abc import Sequence
from pathlib import Path

from syncbn.errors import DataError


def check_folder(folder: Path, remedy: str) -> None:
    """Raise `DataError`, ending in `remedy`, unless `folder` is a folder that this process may list."""
    if not folder.exists():
        raise DataError(f"folder {folder} is missing: {remedy}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file where a folder is due: {remedy}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"no permission to read folder {folder}: {remedy}")


def check_files(files: Sequence[Path], root: Path, remedy: str) -> None:
    """Raise `DataError` for the first file that is missing, empty, unreadable, or a link out of `root`.

    Folders are resolved once each and files only where they are links: two system calls a file, so that a
    million images take seconds.
    """
    inside = root.resolve()
    for folder in {file.parent for file in files}:
        _refuse_outside(folder, inside)
    for file in files:
        if file.is_symlink():
            _refuse_outside(file, inside)
        if not file.is_file():
            raise DataError(f"{file} is missing: {remedy}")
        if not os.access(file, os.R_OK):
            raise DataError(f"no permission to read {file}")
        if not file.stat().st_size:
            raise DataError(f"{file} is damaged (0 bytes): remove it, then {remedy}")


def _refuse_outside(path: Path, inside: Path) -> None:
    target = path.resolve()
    if not target.is_relative_to(inside):
        raise DataError(f"{path} is a link to {target}, out of data.root={inside}: copy it instead")
