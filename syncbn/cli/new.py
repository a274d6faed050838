"""`syncbn new`: a small project of one's own, which runs as it is."""

import keyword
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from syncbn.cli.options import as_json

TEMPLATES = Path(__file__).parents[1] / "templates" / "project"
"""Its files, `NAME` standing for the project's name in theirs, `{NAME}` in what they hold."""


@click.command()
@click.argument("name")
@as_json
def new(name: str, as_json: bool) -> None:
    """Make the folder NAME: a network, a data set, a config that chooses them, a study and a test."""
    from syncbn.cli.guard import say

    _refuse(name)
    folder = Path.cwd() / name
    files = _write(name, folder)
    value = {"name": name, "folder": str(folder), "files": files}
    say(
        value, "\n".join([f"made {folder}", *(f"  {file}" for file in files), _next(name)]), as_json
    )


def _refuse(name: str) -> None:
    """Raise `UsageError` for a name that cannot be a module's, would hide another's, or is taken here."""
    from syncbn.compose import config_files
    from syncbn.errors import UsageError

    if (
        not (name.isascii() and name.isidentifier())
        or name.startswith("_")
        or keyword.iskeyword(name)
    ):
        raise UsageError(
            f"NAME={name!r} is not allowed: it names a Python module, so letters, digits and '_', "
            "beginning with a letter, and no word of Python"
        )
    if name in sys.stdlib_module_names or _is_installed(name):
        raise UsageError(f"NAME={name!r} is not allowed: a module of that name is installed")
    if name in config_files("study"):
        raise UsageError(f"NAME={name!r} is not allowed: there is a study of that name")
    folder = Path.cwd() / name
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists: give another NAME, or remove it")


def _is_installed(name: str) -> bool:
    """Whether `name` can be imported; a mere folder in the current one does not count."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _write(name: str, folder: Path) -> list[str]:
    """Write the project's files and return their names.

    Raises:
        UsageError: the folder cannot be written to.
    """
    from syncbn.errors import UsageError

    written = []
    try:
        for template in sorted(TEMPLATES.rglob("*.template")):
            file = template.relative_to(TEMPLATES).with_suffix("").as_posix()
            file = ".gitignore" if file == "gitignore" else file.replace("NAME", name)
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(template.read_text().replace("{NAME}", name))
            written.append(file)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error}") from error
    return written


def _next(name: str) -> str:
    return f"next:\n  cd {name}\n  syncbn train\n  syncbn compare study={name}"
