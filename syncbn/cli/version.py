"""`syncbn version`: the versions that a report of a problem should name."""

import click

from syncbn.cli.options import as_json


@click.command()
@as_json
def version(as_json: bool) -> None:
    """Print the versions of syncbn and of the packages that it uses."""
    from syncbn.cli.guard import say
    from syncbn.provenance import versions

    found = versions()
    say(found, "\n".join(f"{name} {number}" for name, number in found.items()), as_json)
