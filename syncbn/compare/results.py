"""From finished trials to the files of a study: summary, parquet, figures, report.

The decision that shaped the file: this is the only place of the comparison that writes. Everything else
returns values, and each file appears whole under its name or not at all.
"""

import csv
import io
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from syncbn.compare import claims, figures, report
from syncbn.compare.claims import Verdict
from syncbn.compare.records import TrialRecord, read_trials, refuse_unlike
from syncbn.compare.repeat import repeat_command
from syncbn.config import Config, StudyConfig, identity


def write_results(cfg: Config) -> dict[str, Any]:
    """Write summary, parquet, figures and report of the study in `cfg` into its folder.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        UsageError: trials are unfinished, or differ in more than seed and factor, or miss what a claim
            needs. Nothing is written then.
    """
    trials = read_trials(cfg)
    assert cfg.study is not None
    refuse_unlike(trials, cfg.study.factor)
    summary = summarise(cfg, cfg.study, trials)
    pictures = figures.draw(summary, trials)
    page = report.Page(
        summary=summary,
        question=cfg.study.question,
        command=repeat_command(cfg),
        config={**identity(cfg), "study": asdict(cfg.study)},
        pictures=pictures,
    )
    _write(cfg.folder / "metrics.parquet", parquet(trials))
    for picture in pictures:
        _write(cfg.folder / "figures" / f"{picture.name}.png", picture.png)
    _write(cfg.folder / "report.md", report.markdown(page).encode())
    _write(cfg.folder / "report.html", report.html(page).encode())
    _write(cfg.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())
    return summary


def summarise(cfg: Config, study: StudyConfig, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """The content of `summary.json`; a number that JSON has none for is None.

    Raises:
        UsageError: a claim's metric is missing in some trial.
    """
    metrics = dict.fromkeys(metric for trial in trials for metric in trial.final)
    measured = {
        arm: measurements([t for t in trials if t.arm == arm], metrics, cfg.train.target_error)
        for arm in study.arms
    }
    verdicts = claims.judge(study.claims, measured, study.seeds)
    summary = {
        "study": cfg.name,
        "versions": _shared([trial.versions for trial in trials]),
        "git": ", ".join(sorted({trial.git for trial in trials})),
        "design": design(cfg, study),
        "arms": measured,
        "claims": [claim_entry(verdict) for verdict in verdicts],
    }
    return _without_nonfinite(summary)


def design(cfg: Config, study: StudyConfig) -> dict[str, Any]:
    """What was compared on what."""
    return {
        "data": cfg.data.name,
        "model": cfg.model.arch or cfg.model.name,
        "world_size": cfg.launcher.num_workers,
        "per_rank_batch": cfg.train.per_rank_batch,
        "steps": cfg.train.steps,
        "seeds": list(study.seeds),
        "split": "validation" if cfg.data.validation else "test",
    }


def measurements(
    trials: Sequence[TrialRecord], metrics: Iterable[str], target_error: float | None
) -> dict[str, list[float | None]]:
    """Final metrics of one arm's trials, one value a seed; with a target also the steps to it.

    What a diverged trial could not measure is infinite: censored, not missing.
    """
    table: dict[str, list[float | None]] = {
        metric: [trial.final.get(metric, math.inf if trial.diverged else None) for trial in trials]
        for metric in metrics
    }
    table["diverged"] = [float(trial.diverged) for trial in trials]
    table["seconds"] = [math.inf if trial.diverged else trial.seconds for trial in trials]
    table["steps"] = [math.inf if trial.diverged else trial.steps for trial in trials]
    table["world_size"] = [trial.world_size for trial in trials]
    if target_error is not None:
        table["steps_to_target"] = [first_at_or_below(trial, target_error) for trial in trials]
    return table


def first_at_or_below(trial: TrialRecord, target_error: float) -> float:
    """The first evaluated step with that test error or less; infinity where the budget ended before."""
    errors = trial.points.get("test_error", {})
    return min((step for step, error in errors.items() if error <= target_error), default=math.inf)


def claim_entry(verdict: Verdict) -> dict[str, Any]:
    """A verdict as `summary.json` holds it."""
    bounds90 = verdict.interval90
    return {
        **asdict(verdict.claim),
        "effect": verdict.effect,
        "ci": [verdict.interval.low, verdict.interval.high],
        "ci90": None if bounds90 is None else [bounds90.low, bounds90.high],
        "verdict": verdict.verdict,
        "n": verdict.n,
        "p": verdict.p,
        "p_holm": verdict.p_holm,
        "pairs": verdict.pairs,
        "note": verdict.note,
    }


def parquet(trials: Sequence[TrialRecord]) -> bytes:
    """All points of all trials as a tidy table (arm, seed, step, metric, value), in parquet."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    text = io.StringIO()
    csv.writer(text).writerows(
        (trial.arm, trial.seed, step, metric, value)
        for trial in trials
        for metric, values in trial.points.items()
        for step, value in values.items()
    )
    # Not pa.array: it imports pandas wherever that is installed, which costs 1 s of CPU.
    types = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.float64())
    schema = pa.schema(zip(("arm", "seed", "step", "metric", "value"), types, strict=True))
    table = schema.empty_table()
    if text.tell():
        table = pyarrow.csv.read_csv(
            pa.py_buffer(text.getvalue().encode()),
            read_options=pyarrow.csv.ReadOptions(column_names=schema.names),
            convert_options=pyarrow.csv.ConvertOptions(column_types=schema, null_values=[]),
        )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


def _shared(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """One version a package; all that were used where trials ran under several."""
    packages = dict.fromkeys(package for each in versions for package in each)
    return {
        package: ", ".join(sorted({each[package] for each in versions if package in each}))
        for package in packages
    }


def _without_nonfinite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nonfinite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nonfinite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _write(path: Path, content: bytes) -> None:
    """Put `content` at `path` at once: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
