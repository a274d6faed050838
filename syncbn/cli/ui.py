"""`syncbn ui`: MLflow's pages over a runs folder."""

from pathlib import Path

import click

from syncbn.cli.options import as_json


@click.command()
@click.option(
    "--runs-dir",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="The folder whose store is shown.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@as_json
def ui(runs_dir: Path, port: int, as_json: bool) -> None:
    """Serve MLflow's pages on 127.0.0.1 until stopped. With --json, print the address first."""
    from syncbn.cli.guard import say
    from syncbn.tracking.ui import serve_ui

    if as_json:
        say({"url": f"http://127.0.0.1:{port}", "runs_dir": str(runs_dir.resolve())}, "", True)
    serve_ui(runs_dir, port)
