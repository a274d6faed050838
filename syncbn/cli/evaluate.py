"""`syncbn evaluate`: a trained run, measured again."""

from typing import Any

import click

from syncbn.cli.options import as_json, checkpoint, overrides, run


@click.command()
@run
@overrides
@checkpoint
@as_json
def evaluate(run: str, overrides: tuple[str, ...], checkpoint: str | None, as_json: bool) -> None:
    """Measure the model of RUN, a run's folder or name, on its test samples; nothing of the run is changed.

    OVERRIDES are key=value settings of data.*, task.* and how it is computed, e.g. data=mine data.options.size=64
    train.eval_batch=64. Without them the numbers are those of the run's own evaluation.
    """
    from syncbn.after.find import find
    from syncbn.after.measure import measure
    from syncbn.cli.guard import say

    found = measure(find(run), overrides, checkpoint)
    say(found, _table(found), as_json)


def _table(found: dict[str, Any]) -> str:
    head = (
        f"run {found['run']}, step {found['step']}, on {found['num_samples']} test samples "
        f"of {found['data']}"
    )
    width = max(map(len, found["measures"]))
    rows = [f"{name:<{width}}  {value:.6g}" for name, value in found["measures"].items()]
    return "\n".join([head, *rows])
