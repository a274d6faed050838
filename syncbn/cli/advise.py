"""`syncbn advise`: whether a model needs synchronised statistics, over which ranks, at what cost."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from syncbn.cli.options import as_json, dry_run, overrides

if TYPE_CHECKING:
    from syncbn.launch.plan import Plan


@click.command()
@overrides
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="Folder of a study that ran, with arms local and sync or group_K; nothing is trained then.",
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0, min_open=True),
    help="The smallest difference that matters to you, in the unit of what the task decides by. Default: a point, "
    "which is 0.01 of a test error, and of other measures 1 % of the largest median.",
)
@click.option(
    "--point-worth",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    help="How much longer a step may take for each point of error saved; 0.1 is a tenth.",
)
@click.option("--no-cost", is_flag=True, help="Do not time real ranks.")
@dry_run
@as_json
def advise(
    overrides: tuple[str, ...],
    source: Path | None,
    margin: float | None,
    point_worth: float,
    no_cost: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Synchronise or not? Runs a short study of OVERRIDES, or reads one that ran, and answers in plain words.

    For example: syncbn advise model=mlp data=mnist train.per_rank_batch=2 launcher.num_workers=8
    """
    from syncbn.cli.guard import say
    from syncbn.compare.advice import advice
    from syncbn.compare.report.words.advice import text, to_dict
    from syncbn.compare.study.summary import read_summary
    from syncbn.errors import UsageError
    from syncbn.launch.plan import as_yaml

    if source is not None:
        if overrides or dry_run:
            raise UsageError("--from reads a study that ran: it takes no settings and no --dry-run")
        errors = read_summary(source)
        cost = None if no_cost else _measured_before(source, errors)
    else:
        plan = _error_plan(overrides)
        if dry_run:
            plans = [plan, *([] if no_cost else _cost_plans(plan, overrides, []))]
            say(
                [p.to_dict() for p in plans],
                as_yaml({"studies": [p.to_dict() for p in plans]}),
                as_json,
            )
            return
        errors = _follow(plan)
        chosen = advice(errors, margin, point_worth).synchronised.size
        cost = None if no_cost else _measure_cost(plan, overrides, chosen)
    found = advice(errors, margin, point_worth, cost)
    say(to_dict(found, errors), text(found, errors), as_json)


def _measured_before(folder: Path, errors: dict[str, Any]) -> dict[str, Any] | None:
    """The study of cost that was run beside the one in `folder`, or that one itself where its ranks were real."""
    from syncbn.compare.advice import cost_name
    from syncbn.compare.study.summary import read_summary

    beside = folder.resolve().with_name(cost_name(folder.resolve().name))
    if (beside / "summary.json").is_file():
        return read_summary(beside)
    return None if errors["design"].get("virtual") else errors


def _error_plan(settings: Sequence[str]) -> "Plan":
    """The study of errors, on virtual ranks.

    Raises:
        UsageError: settings that cannot be used, or a single rank, which has no other to synchronise with.
    """
    from syncbn.cli.launching import make_plan
    from syncbn.compare.advice import error_study
    from syncbn.compose import compose
    from syncbn.errors import UsageError

    for setting in settings:
        if setting.startswith("study="):
            raise UsageError(
                f"{setting!r} is not allowed: advise has a study of its own; see --from"
            )
    ranks = compose(["study=advise", *settings]).launcher.num_workers
    if ranks == 1:
        raise UsageError(
            "launcher.num_workers=1 has nothing to synchronise: give the ranks you mean"
        )
    return make_plan("compare", error_study(settings, ranks), os.environ)


def _cost_plans(plan: "Plan", settings: Sequence[str], sizes: Sequence[int]) -> "list[Plan]":
    """The study of cost, on real ranks; none where this machine has fewer cores than there are ranks."""
    from syncbn.cli.launching import make_plan
    from syncbn.compare.advice import cost_study

    cfg = plan.config
    local = cfg.launcher.name == "local"
    if local and cfg.launcher.num_workers * cfg.train.num_threads > len(os.sched_getaffinity(0)):
        return []
    return [make_plan("compare", cost_study(settings, cfg.name, sizes), os.environ)]


def _measure_cost(plan: "Plan", settings: Sequence[str], chosen: int) -> dict[str, Any] | None:
    """The summary of the study of cost, where it can be run."""
    sizes = [] if chosen == plan.config.launcher.num_workers else [chosen]
    summaries = [_follow(cost) for cost in _cost_plans(plan, settings, sizes)]
    return summaries[0] if summaries else None


def _follow(plan: "Plan") -> dict[str, Any]:
    """Run the study of `plan`; what it says goes to stderr, so that stdout is the answer."""
    from syncbn.cli.guard import logged
    from syncbn.cli.launching import follow

    with logged(plan.config.folder), redirect_stdout(sys.stderr):
        return follow(plan)
