"""`syncbn compare`: one study, arms x seeds."""

import click

from syncbn.cli.options import as_json, dry_run, overrides


@click.command()
@overrides
@dry_run
@as_json
def compare(overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Run one study. OVERRIDES are key=value settings, e.g. study=demo launcher.num_workers=2."""
    from syncbn.cli.launching import launch

    launch("compare", overrides, dry_run, as_json)
