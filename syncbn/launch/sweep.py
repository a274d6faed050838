"""The work around the trials of a sweep, in the process that starts it: a study's, except that failures do not end it.

A trial that fails is noted, and a group of ranks that it ended is started anew for those that are left. What says
nothing of one trial alone - a signal, a service or a machine that is gone - ends the sweep; the same command goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn.compare.study.design import Trial, waves
from syncbn.compare.study.failure import failure_in, forget_failure, note_failure, of_the_trial
from syncbn.compare.sweep.design import Sweep
from syncbn.errors import StudyFailed, UsageError
from syncbn.launch.studies import MEANINGS, worst
from syncbn.launch.study import RunWave, held, launched, show, trained
from syncbn.train.record import finished

MOST_NAMED = 5
"""Failed trials that an error names."""


def conduct_sweep(sweep: Sweep, run: RunWave) -> dict[str, Any]:
    """Let `run` take the trials of `sweep`, then write its results, print them, and return the summary.

    Raises:
        SyncbnError: MLflow cannot be used, the folder holds something else, or all was stopped; finished trials are
            kept. A trial that failed is in the summary.
    """
    cfg = sweep.config
    _refuse_other_folder(cfg.folder)
    swept = {trial.name: trial.texts for trial in sweep.trials}
    with held(cfg, sweep.trials) as clock:
        # Also refuses what ran with other settings, before a launch is recorded.
        pending = _pending(sweep)
        with launched(cfg, sweep.trials, clock, swept):
            with trained(sweep.trials, clock):
                _take(pending, cfg.launcher.processes, run)
            from syncbn.compare.sweep.results import write_results

            summary = write_results(sweep)
            clock.lap("figure, report")
    from syncbn.compare.sweep.tables import print_table

    show(print_table, summary, cfg, clock)
    return summary


def raise_failures(summary: dict[str, Any]) -> None:
    """Raise `StudyFailed`, with the code of the worst failure, where some trial of a sweep did not end well."""
    failed = [trial for trial in summary["trials"] if trial["exit_code"]]
    if not failed:
        return
    named = [f"{trial['name']} ({MEANINGS[trial['exit_code']]})" for trial in failed[:MOST_NAMED]]
    more = [f"{len(failed) - MOST_NAMED} more"] if len(failed) > MOST_NAMED else []
    error = StudyFailed(
        f"{len(failed)} of {len(summary['trials'])} trials failed: {', '.join([*named, *more])}",
        worst([trial["exit_code"] for trial in failed]),
    )
    error.add_note("(what each said stands in the report, and in its error.log)")
    raise error


def _refuse_other_folder(folder: Path) -> None:
    """Raise `UsageError` where `folder` is that of a run, whose summary a sweep would replace."""
    if (folder / "journal.jsonl").is_file():
        raise UsageError(f"{folder} holds a run: give the sweep another name, name=NAME")


def _pending(sweep: Sweep) -> list[Trial]:
    """The trials that have not finished, ready to be tried.

    Raises:
        UsageError: one has finished with other settings.
    """
    pending: list[Trial] = [t for t in sweep.trials if finished(t.config) is None]
    for trial in pending:
        forget_failure(trial.config.folder)
    return pending


def _take(pending: Sequence[Trial], processes: int | None, run: RunWave) -> None:
    """Let processes take `pending`, wave by wave, and once more where a failure ended a wave early."""
    while pending:
        size, wave = waves(pending, processes)[0]
        try:
            run(wave, size)
        except Exception as error:
            failed = _failed(wave, size)
            if failed is None or not of_the_trial(error):
                raise
            note_failure(failed.config.folder, error)
        left = [trial for trial in pending if not _ended(trial)]
        if len(left) == len(pending):
            raise RuntimeError(f"a group of {size} ranks ended and ran none of {len(wave)} trials")
        pending = left


def _failed(wave: Sequence[Trial], size: int) -> Trial | None:
    """The trial that ended a group of `size` ranks, of which all take part in one after the other; None for no such."""
    together = (trial for trial in wave if trial.config.num_ranks == size)
    return next((trial for trial in together if not _ended(trial)), None)


def _ended(trial: Trial) -> bool:
    return finished(trial.config) is not None or failure_in(trial.config.folder) is not None
