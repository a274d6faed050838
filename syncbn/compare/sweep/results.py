"""From the trials of a sweep to its files: summary, figure, report."""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from syncbn.compare.measure import deciding
from syncbn.compare.report.figures.parallel import parallel_coordinates
from syncbn.compare.results import write_whole
from syncbn.compare.study.failure import failure_in
from syncbn.compare.study.summarise import shared_versions
from syncbn.compare.study.summary import finite
from syncbn.compare.sweep.design import Sweep, SweepTrial
from syncbn.compare.sweep.page import html, markdown
from syncbn.config import config_hash, identity
from syncbn.errors import NonFinite
from syncbn.tracking.journal import read_journal
from syncbn.tracking.redact import redact
from syncbn.train.record import finished


def write_results(sweep: Sweep) -> dict[str, Any]:
    """Write summary, figure and report of `sweep` into its folder, each file whole.

    Returns:
        The summary, as `summary.json` holds it.
    """
    summary = summarise(sweep)
    folder, picture = sweep.config.folder, parallel_coordinates(summary)
    write_whole(folder / "figures" / f"{picture.name}.png", picture.png)
    write_whole(folder / "report.md", markdown(summary, picture).encode())
    write_whole(folder / "report.html", html(summary, picture).encode())
    write_whole(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())
    return summary


def summarise(sweep: Sweep) -> dict[str, Any]:
    """The content of `summary.json`: trials from the best to the worst, then those without a result.

    A trial has its swept `settings`, how it ended (`status` finished, diverged or failed, with `exit_code` and
    `error`), and where it finished its `final` metrics, None for what is not finite.
    """
    cfg = sweep.config
    decides = deciding(cfg.task)
    entries = [_entry(trial) for trial in sweep.trials]

    def badness(entry: dict[str, Any]) -> float:
        value = entry["final"].get(decides.name)
        return math.inf if value is None else decides.sign * value

    ranked = sorted(entries, key=lambda entry: (entry["exit_code"] != 0, badness(entry)))
    best = ranked[0] if math.isfinite(badness(ranked[0])) else None
    starts = [start for trial in sweep.trials if (start := _start(trial))]
    return {
        "sweep": cfg.name,
        "measure": asdict(decides),
        "keys": finite(dict(sweep.axes)),
        "best": None if best is None else best["name"],
        "command": _command("sweep", sweep.overrides),
        "best_command": None if best is None else _best_command(sweep, best["texts"].items()),
        "versions": shared_versions([start["versions"] for start in starts]),
        "git": ", ".join(sorted({start["git"] for start in starts})),
        "config": identity(cfg),
        "trials": ranked,
    }


def _entry(trial: SweepTrial) -> dict[str, Any]:
    """What `summary.json` says of a trial."""
    done, failure = finished(trial.config), failure_in(trial.config.folder)
    status, code, error = "finished", 0, ""
    if done is not None and done.final.get("diverged"):
        status, code = "diverged", NonFinite.exit_code
        error = f"loss or statistics were not finite after {done.steps} steps"
    elif done is None:
        status = "failed"
        code, error = (failure.exit_code, failure.error) if failure else (1, "did not run")
    final = finite(dict(done.final)) if done is not None and not code else {}
    return {
        "name": trial.name,
        "overrides": trial.command,
        "settings": finite(dict(trial.settings)),
        "texts": dict(trial.texts),
        "status": status,
        "exit_code": code,
        "error": error,
        "final": final,
        "steps": done.steps if done else None,
        "seconds": done.seconds if done else None,
        "world_size": done.world_size if done else None,
        "config_hash": config_hash(trial.config),
    }


def _start(trial: SweepTrial) -> dict[str, Any] | None:
    """The first record of a trial's journal, where it has one."""
    path = trial.config.folder / "journal.jsonl"
    records = read_journal(path) if path.is_file() else iter(())
    return next((record for record in records if record.get("event") == "start"), None)


def _best_command(sweep: Sweep, best: Iterable[tuple[str, str]]) -> str:
    fixed = [setting for setting in sweep.fixed if setting.partition("=")[0] != "name"]
    name = f"name={sweep.config.name}-best"  # a run of the default name may stand there already
    return _command("train", [name, *fixed, *(f"{key}={text}" for key, text in best)])


def _command(verb: str, settings: Sequence[str]) -> str:
    """A command for a shell, without secrets."""
    pairs = [setting.partition("=") for setting in settings]
    return shlex.join(["syncbn", verb, *(f"{k}{e}{redact(v, k)}" for k, e, v in pairs)])
