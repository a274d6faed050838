"""`syncbn jobs`: the jobs of a Ray cluster."""

from pathlib import Path

import click

from syncbn.cli.options import address, as_json, token_file


@click.command()
@address
@token_file
@as_json
def jobs(address: str, token_file: Path | None, as_json: bool) -> None:
    """List the jobs of a Ray cluster, oldest first."""
    from syncbn.cli.cluster import enter
    from syncbn.cli.guard import say

    found = enter(address, token_file).jobs()
    lines = [f"{job['status']:<10} {job['submission_id']:<32} {job['entrypoint']}" for job in found]
    say(found, "\n".join(lines) or "no jobs", as_json)
