"""`syncbn version`: the versions that a report of a problem should name."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import click

from syncbn.cli.options import as_json

PACKAGES = ("syncbn", "torch", "torchvision", "ray", "mlflow", "hydra-core")


@click.command()
@as_json
def version(as_json: bool) -> None:
    """Print the versions of syncbn and of what it stands on."""
    from syncbn.cli.guard import say

    found = versions()
    say(found, "\n".join(f"{name} {number}" for name, number in found.items()), as_json)


def versions() -> dict[str, str]:
    """Package name to installed version, or `not installed`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = installed(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
