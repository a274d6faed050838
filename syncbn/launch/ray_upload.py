"""What goes to a cluster with a job: the project's folder, and this package with its configs where that lacks it.

Ray sends a folder less what its .gitignore and .rayignore name, and keeps it in the memory of the cluster's head. So
one that is large by mistake, with data or results in it, is refused here, and the files that make it so are named.
"""

import heapq
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from syncbn.compose import config_folder, config_folders
from syncbn.errors import UsageError

MOST_BYTES = 50 * 2**20
"""A project is code and configs, well under a megabyte. A dashboard takes 100 MiB in a request, packed, and a proxy in
front of it often less."""


@dataclass(frozen=True)
class Upload:
    """What a job takes along."""

    working_dir: Path | None
    """The folder whose copy the job runs in, less .gitignore and .rayignore; None is an empty one."""
    package: Path | None
    """Our package, where `working_dir` does not hold it: it is imported before any that the cluster has."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, under the names that Ray has for them."""
        return {
            "working_dir": None if self.working_dir is None else str(self.working_dir),
            "py_modules": [] if self.package is None else [str(self.package)],
        }


def upload_of(overrides: Sequence[str], folder: Path) -> Upload:
    """What a job with `overrides` takes along that is sent from `folder`.

    `folder` itself, where it is a project: one with a `conf/`, or with the modules that `extensions` names. Otherwise
    the checkout that this package runs from; where there is none, or SYNCBN_CONF replaces its configs, the package
    alone.

    Raises:
        UsageError: the folder, or that of our configs, holds more than `MOST_BYTES` that would be sent.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    whole = config_folder() == checkout / "conf"
    if whole and folder.resolve() == checkout:
        upload = Upload(checkout, None)
    elif len(config_folders()) > 1 or any(o.startswith("extensions=") for o in overrides):
        upload = Upload(folder, package)
    else:
        upload = Upload(checkout, None) if whole else Upload(None, package)
    for sent in _folders(upload):
        refuse_large(sent)
    return upload


def _folders(upload: Upload) -> list[Path]:
    """Folders of the user's choice that are sent, wholly or in part."""
    return [
        *([] if upload.working_dir is None else [upload.working_dir]),
        *([] if upload.package is None else [config_folder()]),
    ]


@contextmanager
def runtime_env(upload: Upload) -> Iterator[dict[str, Any]]:
    """The part of Ray's `runtime_env` that is files; copies made for it last as long as the context."""
    with TemporaryDirectory(prefix="syncbn-") as temporary:
        empty = Path(temporary) / "empty"
        empty.mkdir()
        env: dict[str, Any] = {"working_dir": str(upload.working_dir or empty)}
        if upload.package is not None:
            env["py_modules"] = [str(_with_configs(upload.package, Path(temporary)))]
        yield env


def _with_configs(package: Path, folder: Path) -> Path:
    """A copy of `package` in `folder`, with the configs that are used here as its own."""
    copy = folder / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / "conf", ignore_errors=True)
    shutil.copytree(config_folder(), copy / "conf")
    return copy


def refuse_large(folder: Path) -> None:
    """Raise `UsageError`, with the largest files, where more than `MOST_BYTES` of `folder` would be sent."""
    sizes = sent_files(folder)
    total = sum(sizes.values())
    if total <= MOST_BYTES:
        return
    raise UsageError(
        f"{folder} has {_megabytes(total)} to send with the job, at most {_megabytes(MOST_BYTES)} are allowed: "
        f"{_way_out(folder, sizes)}"
    )


def too_large(upload: Upload, address: str) -> UsageError:
    """What to say where `address`, the cluster or a proxy in front of it, takes less than we would send."""
    told = [
        f"{folder} has {_megabytes(sum(sizes.values()))}: {_way_out(folder, sizes)}"
        for folder in _folders(upload)
        if (sizes := sent_files(folder))
    ]
    return UsageError(
        f"{address} does not take what goes along with the job, which is too large for it (HTTP 413), or for a proxy "
        f"in front of it: {'; '.join(told) or 'raise its limit'}"
    )


def _way_out(folder: Path, sizes: Mapping[Path, int]) -> str:
    largest = heapq.nlargest(3, sizes.items(), key=lambda item: item[1])
    named = ", ".join(f"{path.relative_to(folder)} ({_megabytes(size)})" for path, size in largest)
    return f"list what the job does not need in {folder / '.rayignore'}; the largest are {named}"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 2**20 else 1}f} MB"


def sent_files(folder: Path) -> dict[Path, int]:
    """The files that Ray would send of `folder`, with their sizes in bytes; chosen by Ray's own functions.

    Raises:
        UsageError: something in the folder cannot be read.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    excludes = [_get_excludes(folder, ray_constants.get_runtime_env_default_excludes())]
    git = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    quiet = logging.getLogger(__name__)  # Ray's own names each ignore file that it reads
    try:
        _dir_travel(folder.absolute(), excludes, note, include_gitignore=git, logger=quiet)
    except OSError as error:
        raise UsageError(f"{folder} cannot be sent with the job: {error}") from error
    return sizes
