"""`syncbn logs`: what a job has written."""

import sys
from pathlib import Path

import click

from syncbn.cli.options import address, as_json, job_id, token_file


@click.command()
@job_id
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is over.")
@address
@token_file
@as_json
def logs(job_id: str, follow: bool, address: str, token_file: Path | None, as_json: bool) -> int:
    """Print a job's output. With -f, the exit code is the job's."""
    from syncbn.cli.cluster import enter, follow_logs
    from syncbn.cli.guard import say
    from syncbn.launch.ray_dashboard import exit_code_of

    dashboard = enter(address, token_file)
    if not follow:
        text = dashboard.logs(job_id)
        say({"job_id": job_id, "logs": text}, text.rstrip("\n"), as_json)
        return 0
    parts: list[str] = []
    job = follow_logs(dashboard, job_id, parts.append if as_json else _write)
    if as_json:
        say({"job_id": job_id, "logs": "".join(parts), "status": job["status"]}, "", as_json)
    return exit_code_of(job)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
