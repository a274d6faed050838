"""`syncbn studies`: all studies of a tier, one after the other, and the page of their results."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from syncbn.cli.options import as_json, dry_run

if TYPE_CHECKING:
    from syncbn.compare.suite.tiers import Launch
    from syncbn.launch.studies import Job, Outcome


@click.command()
@click.argument("words", nargs=-1, metavar="[NAME|KEY=VALUE]...")
@click.option(
    "--tier",
    type=click.Choice(["fast", "full"]),
    help="All studies of a tier: fast takes minutes, full hours. NAMEs alone are taken as in full.",
)
@click.option("--show", is_flag=True, help="Run nothing: write the page from finished studies.")
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("docs/results.md"),
    show_default=True,
    help="The page that --show writes, between its markers.",
)
@dry_run
@as_json
def studies(
    words: tuple[str, ...],
    tier: str | None,
    show: bool,
    page: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run all studies of a tier, or those named, in order; KEY=VALUE settings go to each.

    One that fails is noted and the rest go on. Finished trials are kept, so the same command continues. At the end
    stands a table, also in studies.md and studies.json of the runs folder; the exit code is that of the worst failure.
    """
    from syncbn.cli.guard import say
    from syncbn.errors import UsageError
    from syncbn.launch.plan import as_yaml

    names = [word for word in words if "=" not in word and word[:1] not in "~-"]
    settings = [word for word in words if word not in names]
    if not (tier or names or show):
        raise UsageError(
            "which studies? --tier fast (minutes), --tier full (hours), or their NAMEs"
        )
    chosen = _launches(tier or "full", names, settings)
    if show:
        from syncbn.compare.suite.results_page import write_page

        found = write_page(chosen, _runs_dir(settings), page)
        say(found, f"{len(found['studies'])} studies -> {page}", as_json)
        return
    jobs = [_job(launch, settings) for launch in chosen]
    if dry_run:
        plans = [_planned(job) for job in jobs]
        say(plans, as_yaml({"studies": plans}), as_json)
        return
    _run(jobs, _runs_dir(settings), as_json)


def _launches(tier: str, names: Sequence[str], settings: Sequence[str]) -> "list[Launch]":
    """What runs, in order.

    Raises:
        UsageError: an unknown name, settings that would give all studies one folder, or torchrun around it all.
    """
    from syncbn.compare.suite.tiers import declared, studies_of
    from syncbn.compose import config_files
    from syncbn.errors import UsageError

    for setting in settings:
        if setting.lstrip("+~").split("=", 1)[0] in ("name", "study"):
            raise UsageError(f"{setting!r} is not allowed: each study keeps its own")
    if "WORLD_SIZE" in os.environ:
        raise UsageError("studies start their own ranks: run it plainly, not with torchrun")
    return studies_of(tier, declared(config_files("study").values()), names)


def _runs_dir(settings: Sequence[str]) -> Path:
    """Where studies go: `runs_dir` as the settings have it."""
    from syncbn.compose import compose

    places = [setting for setting in settings if setting.startswith("runs_dir=")]
    return Path(compose(places).runs_dir)


def _job(launch: "Launch", settings: Sequence[str]) -> "Job":
    """How one study is started; where its settings cannot be used, why they cannot."""
    from syncbn.cli.launching import make_plan
    from syncbn.errors import UsageError
    from syncbn.launch.studies import Job

    overrides = (*launch.overrides, *settings)
    try:
        return Job(launch, overrides, make_plan("compare", overrides, os.environ))
    except UsageError as error:
        return Job(launch, overrides, None, refused=str(error))


def _planned(job: "Job") -> dict[str, Any]:
    """What would run, as plain values, without secrets."""
    if job.plan is None:
        return {"study": job.launch.name, "refused": job.refused}
    plan = job.plan.to_dict()
    del plan["config"]  # 16 of them are too long to read: `compare --dry-run` shows each
    return {"study": job.launch.name, "budget_s": job.launch.budget_s, **plan}


def _run(jobs: "Sequence[Job]", runs_dir: Path, as_json: bool) -> None:
    """Run `jobs`, keep the ledger, and print the table.

    Raises:
        UsageError: none of them can be started; with what is wrong with the first.
        Stopped: by a signal; finished trials are kept.
        StudyFailed: with the exit code of the worst failure.
    """
    from syncbn.cli.guard import say
    from syncbn.compare.suite.ledger import Ledger, text, to_dict
    from syncbn.errors import Stopped, UsageError
    from syncbn.launch.studies import run_all

    if all(job.plan is None for job in jobs):
        raise UsageError(jobs[0].refused)
    ledger = Ledger(runs_dir)
    codes: dict[str, int] = {}

    def begin(job: "Job") -> None:
        place = f"[{len(codes) + 1}/{len(jobs)}]"
        click.echo(f"{place} {job.launch.name}: {job.launch.question or job.refused}", err=True)

    def done(outcome: "Outcome") -> None:
        codes[outcome.job.launch.name] = outcome.code
        ledger.note(_entry(outcome), outcome.seconds, outcome.trained)

    stopped = run_all(jobs, begin, done, sys.stderr if as_json else None)
    entries = [ledger.entries[name] for name in codes]
    say(to_dict(entries), text(entries), as_json)
    if stopped:
        raise Stopped(stopped)
    _raise_failures(codes)


def _raise_failures(codes: "dict[str, int]") -> None:
    """Raise `StudyFailed` where some study did not end well."""
    from syncbn.errors import StudyFailed
    from syncbn.launch.studies import failure_words, worst

    code = worst(list(codes.values()))
    if code:
        error = StudyFailed(failure_words(codes), code)
        error.add_note("(what each said stands above, and in its error.log)")
        raise error


def _entry(outcome: "Outcome") -> dict[str, Any]:
    """What the ledger keeps of a study."""
    from syncbn.compare.study.summary import read_summary
    from syncbn.compare.suite.ledger import entry
    from syncbn.launch.studies import MEANINGS

    state = MEANINGS[outcome.code]
    summary = read_summary(outcome.job.folder) if outcome.code == 0 else None
    return entry(outcome.job.launch, state, outcome.code, outcome.note, summary)
