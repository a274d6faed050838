"""`syncbn predict`: what a trained run's model says of files."""

from pathlib import Path
from typing import Any

import click

from syncbn.cli.options import as_json, checkpoint, run


@click.command()
@run
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Classes to show a file, the likeliest first.",
)
@checkpoint
@as_json
def predict(
    run: str, paths: tuple[Path, ...], top: int, checkpoint: str | None, as_json: bool
) -> None:
    """Say what the model of RUN, a run's folder or name, makes of PATHS, files or folders of them.

    Files are prepared as the samples of the run's data set: see `load` in docs/after-training.md for one of your own.
    """
    from syncbn.after.find import find
    from syncbn.after.predict import files_of, predict
    from syncbn.after.trained import open_run
    from syncbn.cli.guard import say

    found = find(run)
    files_of(paths, any_suffix=True)  # what is missing is said before anything is loaded
    said = list(predict(open_run(found, checkpoint), paths, top))
    say(said, "\n".join(map(_line, said)), as_json)


def _line(said: dict[str, Any]) -> str:
    if "values" in said:
        return f"{said['file']}  {said['values']}"
    ranked = ", ".join(f"{one['name']} {one['probability']:.4f}" for one in said["classes"])
    return f"{said['file']}  {ranked}"
