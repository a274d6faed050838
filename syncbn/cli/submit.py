"""`syncbn submit`: send a run, a study or a sweep to a Ray cluster."""

import os
from pathlib import Path
from typing import Any

import click

from syncbn.cli.options import address, as_json, dry_run, overrides, token_file


@click.command()
@click.argument("verb", type=click.Choice(["train", "compare", "sweep"]))
@overrides
@address
@token_file
@dry_run
@as_json
def submit(
    verb: str,
    overrides: tuple[str, ...],
    address: str,
    token_file: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send a run (train), a study (compare) or a sweep to a Ray cluster. OVERRIDES are key=value settings.

    The current folder goes along where it is a project, one with a conf/ or extensions, and so does this syncbn. Files
    go to runs_dir on the cluster, storage that its nodes share; without it, to ~/syncbn-runs there.
    """
    from syncbn.cli.cluster import enter, require_room
    from syncbn.cli.environment import of_mlflow
    from syncbn.cli.guard import say
    from syncbn.cli.launching import make_plan
    from syncbn.launch.plan import as_yaml
    from syncbn.launch.ray_dashboard import require_url
    from syncbn.launch.ray_jobs import entrypoint, files, job_overrides, send
    from syncbn.launch.ray_upload import upload_of

    address = address.rstrip("/")
    require_url(address)
    sent = job_overrides(overrides, Path.cwd())
    plan = make_plan(verb, sent, of_mlflow(os.environ))
    upload = upload_of(sent, Path.cwd())
    what: dict[str, Any] = {"address": address, **upload.to_dict()}
    if dry_run:
        plan.config.launcher.address = address
        what |= plan.to_dict() | {
            "command": entrypoint(verb, sent),
            "files": files(sent, plan.config.name),
        }
        say(what, as_yaml(what), as_json)
        return
    dashboard = enter(address, token_file)
    require_room(dashboard, plan)
    job_id = send(dashboard, verb, plan.config, sent, upload)
    what |= {"job_id": job_id, "files": files(sent, plan.config.name)}
    say(what, _next_commands(job_id, address, what["files"]), as_json)


def _next_commands(job_id: str, address: str, files: str) -> str:
    follow = f"--address {address}"
    return "\n".join(
        [
            f"sent {job_id}",
            f"  files on the cluster: {files}",
            f"  syncbn logs {job_id} -f {follow}",
            f"  syncbn status {job_id} {follow}",
            f"  syncbn stop {job_id} {follow}",
        ]
    )
