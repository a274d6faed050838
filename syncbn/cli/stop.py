"""`syncbn stop`: end a job at its next step, with a checkpoint."""

from pathlib import Path

import click

from syncbn.cli.options import address, as_json, job_id, token_file


@click.command()
@job_id
@address
@token_file
@as_json
def stop(job_id: str, address: str, token_file: Path | None, as_json: bool) -> None:
    """Stop a job and wait until it is over. It saves a checkpoint first, for which it has a minute."""
    from syncbn.cli.cluster import enter, wait_for
    from syncbn.cli.guard import say
    from syncbn.launch.ray_dashboard import TERMINAL

    dashboard = enter(address, token_file)
    if dashboard.job(job_id)["status"] not in TERMINAL:
        dashboard.stop(job_id)
    job = wait_for(dashboard, job_id)
    say(job, f"{job_id}: {job['status']}", as_json)
