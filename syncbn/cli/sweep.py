"""`syncbn sweep`: one run in every combination of some settings."""

import click

from syncbn.cli.options import as_json, dry_run, overrides


@click.command()
@overrides
@dry_run
@as_json
def sweep(overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train in every combination of OVERRIDES with several values, e.g. optim.lr=0.01,0.1 seed='range(0,3)'.

    Values are a,b or choice(a,b), range(start,stop,step), or glob(*) over the options of a group. All trials are
    checked first. One that fails is noted and the rest go on; finished trials are kept, so the same command continues.
    The exit code is that of the worst failure.
    """
    from syncbn.cli.launching import launch

    launch("sweep", overrides, dry_run, as_json)
