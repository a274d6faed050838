"""`syncbn ship`: what MLflow missed of a run or study, from its journals."""

from pathlib import Path

import click

from syncbn.cli.options import as_json


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--uri", help="The tracking URI; else the one that the run was started with.")
@as_json
def ship(folder: Path, uri: str | None, as_json: bool) -> None:
    """Send all that MLflow lacks of the run or study in FOLDER; a second time changes nothing."""
    from syncbn.cli.guard import say
    from syncbn.tracking import study

    num_runs = study.ship(folder, uri)
    say(
        {"folder": str(folder), "num_runs": num_runs},
        f"{folder}: {num_runs} run(s) are whole in MLflow",
        as_json,
    )
