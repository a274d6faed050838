"""`syncbn compare-to`: whether a study came out worse than an earlier launch of it, for a gate in CI."""

from pathlib import Path

import click

from syncbn.cli.options import as_json


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="What to compare, NAME or NAME:lower or NAME:higher (what is better). Default: the study's "
    "primary metric; for times what its task decides by.",
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="A change for the worse that is accepted, in the metric's unit; 0.01 is one point of a share.",
)
@as_json
def compare_to(
    base: Path, new: Path, metrics: tuple[str, ...], margin: float, as_json: bool
) -> None:
    """Compare two launches of one study, folders BASE and NEW. The exit code is 9 where NEW is worse, else 0.

    An arm is worse when the whole 95 % interval of its paired change lies beyond the margin and survives Holm's
    correction, or when a seed diverged or lost its number; a study also when a claim is no longer reproduced.
    """
    from syncbn.cli.guard import say
    from syncbn.compare.regression import compare, differences, metric_of
    from syncbn.compare.report.words.regression import conclusion, text, to_dict
    from syncbn.compare.study.summary import read_summary
    from syncbn.errors import GotWorse

    old, late = read_summary(base), read_summary(new)
    found = compare(old, late, [metric_of(metric, old) for metric in metrics], margin)
    other = differences(old, late)
    say(to_dict(found, other), text(found, other), as_json)
    if found.worse:
        raise GotWorse(conclusion(found))
