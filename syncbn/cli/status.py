"""`syncbn status`: how one job is doing."""

from pathlib import Path

import click

from syncbn.cli.options import address, as_json, job_id, token_file


@click.command()
@job_id
@address
@token_file
@as_json
def status(job_id: str, address: str, token_file: Path | None, as_json: bool) -> int:
    """Show the state of a job. The exit code is the job's own where it failed, 130 where it was stopped, else 0."""
    from syncbn.cli.cluster import enter
    from syncbn.cli.guard import say
    from syncbn.launch.ray_dashboard import exit_code_of

    job = enter(address, token_file).job(job_id)
    code = exit_code_of(job)
    say(job, f"{job_id}: {job['status']}" + (f" (exit code {code})" if code else ""), as_json)
    return code
