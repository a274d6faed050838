"""The `syncbn` command: a file a verb.

A verb's module is imported when the verb is named, and imports torch, Ray or MLflow only when it runs.
"""

import sys
from importlib import import_module

import click

VERBS = (
    "new",
    "train",
    "sweep",
    "compare",
    "compare-to",
    "advise",
    "studies",
    "evaluate",
    "predict",
    "export",
    "submit",
    "jobs",
    "status",
    "logs",
    "stop",
    "settings",
    "doctor",
    "ship",
    "ui",
    "version",
)


class Verbs(click.Group):
    """A command group whose commands are found by the name of their module, a dash standing for `_`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs, in the order in which one uses them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb `cmd_name`, or None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module = cmd_name.replace("-", "_")
        return getattr(import_module(f"syncbn.cli.{module}"), module)


@click.command(cls=Verbs)
def cli() -> None:
    """Train with synchronised batch norm, and compare it with the alternatives."""


def main() -> None:
    """The console script."""
    from syncbn.cli.guard import invoke

    sys.exit(invoke(cli, sys.argv[1:], prog_name="syncbn"))
