"""Provenance of results: versions of the packages that computed them, and the revision of the code."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("syncbn", "torch", "torchvision", "numpy", "ray", "mlflow", "hydra-core")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, where they are installed.

    A job runs the code of who sent it, whose version stands in SYNCBN_VERSION.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if sent := os.environ.get("SYNCBN_VERSION"):
        found["syncbn"] = sent
    return found


@cache
def git_revision() -> str:
    """Short revision of the checkout this package runs from, `-dirty` where it has changes; "" outside one.

    A job runs from a copy without history; who sent it has named the revision in SYNCBN_REVISION.
    """
    if "SYNCBN_REVISION" in os.environ:
        return os.environ["SYNCBN_REVISION"]
    folder = Path(__file__).resolve().parent
    if not (folder.parent / "pyproject.toml").is_file():
        return ""  # installed: a repository around it is somebody else's
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def sources(modules: Iterable[str]) -> dict[str, str]:
    """The sha256 of the source of each of the imported `modules`: of its file, or of all files of a package."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return {name: _sha256(Path(file)) for name, file in files.items() if file}


def _sha256(file: Path) -> str:
    package = file.name == "__init__.py"
    digest = hashlib.sha256()
    for path in sorted(file.parent.rglob("*.py")) if package else [file]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
