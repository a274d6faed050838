"""Provenance of results: versions of the packages that computed them, and the revision of the code."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("syncbn", "torch", "torchvision", "numpy", "ray", "mlflow", "hydra-core")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_revision() -> str:
    """Short revision of the checkout this package runs from, `-dirty` where it has changes; "" outside one.

    A job runs from a copy without history; who sent it has named the revision in SYNCBN_REVISION.
    """
    if "SYNCBN_REVISION" in os.environ:
        return os.environ["SYNCBN_REVISION"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
