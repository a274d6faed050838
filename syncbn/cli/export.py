"""`syncbn export`: a trained run's model as a file that needs nothing of this package."""

from pathlib import Path

import click

from syncbn.cli.options import as_json, checkpoint, run


@click.command()
@run
@click.option(
    "--to",
    required=True,
    type=click.Choice(("safetensors", "pt2", "onnx")),
    help="Weights alone; torch.export's archive; or ONNX.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file; else model.FORMAT in the run's folder.",
)
@checkpoint
@as_json
def export(run: str, to: str, out: Path | None, checkpoint: str | None, as_json: bool) -> None:
    """Write the model of RUN, a run's folder or name, with torch's own norms and any number of samples a batch.

    The file's outputs are compared with the run's on test samples before it is put in place.
    """
    from syncbn.after.export import export as write
    from syncbn.after.export import require
    from syncbn.after.find import find
    from syncbn.after.trained import open_run
    from syncbn.cli.guard import say

    found = find(run)

    require(to, out or found.folder / f"model.{to}")
    made = write(open_run(found, checkpoint), to, out)
    text = f"{made['file']}: step {made['step']}, {made['bytes']} bytes, "
    say(made, f"{text}within {made['max_difference']:.1g} of the run's outputs", as_json)
