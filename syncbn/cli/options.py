"""Arguments and options that several verbs share, each defined once."""

from pathlib import Path

import click

overrides = click.argument("overrides", nargs=-1)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Print config, ranks, resources and command; start nothing."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
job_id = click.argument("job_id")
address = click.option(
    "--address",
    envvar="SYNCBN_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    show_envvar=True,
    help="The Ray cluster's dashboard.",
)
token_file = click.option(
    "--token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, readable=True),
    help="File with the cluster's token; else RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
)
run = click.argument("run")
checkpoint = click.option(
    "--checkpoint",
    metavar="best|latest|STEP",
    help="Whose weights: the one that did best (train.keep_best), the newest, or that of a step. Default: the best "
    "where the run keeps one, else the newest.",
)
