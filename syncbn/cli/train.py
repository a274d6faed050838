"""`syncbn train`: one run."""

import click

from syncbn.cli.options import as_json, dry_run, overrides


@click.command()
@overrides
@click.option("--multirun", "-m", is_flag=True, help="The same as `syncbn sweep`.")
@dry_run
@as_json
def train(overrides: tuple[str, ...], multirun: bool, dry_run: bool, as_json: bool) -> None:
    """Train one network. OVERRIDES are key=value settings, e.g. data=mnist norm=sync train.steps=100."""
    from syncbn.cli.launching import launch

    launch("sweep" if multirun else "train", overrides, dry_run, as_json)
