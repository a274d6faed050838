"""Builds the native library of mutants: a source is compiled again only where a mutant changes what it includes."""

import hashlib
import os
import subprocess
import sysconfig
import tomllib
from pathlib import Path

COMPILER = os.environ.get("CXX", "g++")


class Builder:
    """A cache of compiled sources.

    Args:
        objects: folder for the object files, named after a digest of what the compiler read.
    """

    def __init__(self, objects: Path) -> None:
        self._objects = objects

    def build(self, root: Path) -> None:
        """Build the library of the package in the folder `root`, in the place of the one there.

        Raises:
            subprocess.CalledProcessError: it does not compile.
        """
        project = tomllib.loads((root / "pyproject.toml").read_text())
        (extension,) = project["tool"]["setuptools"]["ext-modules"]
        objects = [
            self._compiled(root, source, extension["extra-compile-args"])
            for source in extension["sources"]
        ]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        library = extension["name"].replace(".", "/") + suffix
        (root / library).unlink(missing_ok=True)  # it may be linked to another tree's
        self._run(root, "-shared", "-o", library, *objects, *extension["extra-link-args"])

    def _compiled(self, root: Path, source: str, options: list[str]) -> str:
        options = [*options, "-fPIC"]
        text = self._run(root, *options, "-E", source)
        compiled = self._objects / f"{hashlib.sha256(text).hexdigest()}.o"
        if not compiled.exists():
            self._run(root, *options, "-c", source, "-o", str(compiled))
        return str(compiled)

    def _run(self, root: Path, *arguments: str) -> bytes:
        command = [COMPILER, *arguments]
        return subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
