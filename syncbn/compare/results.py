"""From finished trials to the files of a study: summary, parquet, figures, report.

The decision that shaped the file: this is the only place of the comparison that writes. Everything else
returns values, and each file appears whole under its name or not at all.
"""

import csv
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from syncbn.compare import claims, figures, measured, report
from syncbn.compare.claims import Verdict
from syncbn.compare.contrasts import Curve
from syncbn.compare.design import arm_configs, arms_of, study_of
from syncbn.compare.preflight import free_keys
from syncbn.compare.records import TrialRecord, read_trials, refuse_undeclared, refuse_unlike
from syncbn.compare.repeat import repeat_command
from syncbn.compare.tuning import Choice, chosen, values_of
from syncbn.config import Config, StudyConfig, identity


def write_results(cfg: Config) -> dict[str, Any]:
    """Write summary, parquet, figures and report of the study in `cfg` into its folder.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        UsageError: trials are unfinished, or differ in more than seed and factor, or did not run what is declared, or
            miss what a claim needs. Nothing is written then.
    """
    trials = read_trials(cfg)
    study = study_of(cfg)
    choices = chosen(cfg)
    refuse_unlike(trials, [*study.factor, *free_keys(study)])
    refuse_undeclared(trials, arm_configs(cfg, values_of(choices)))
    summary = summarise(cfg, study, trials, choices)
    pictures = figures.draw(summary, trials)
    page = report.Page(
        summary=summary,
        question=study.question,
        command=repeat_command(cfg),
        config={**identity(cfg), "study": asdict(study)},
        pictures=pictures,
    )
    _write(cfg.folder / "metrics.parquet", parquet(trials))
    for picture in pictures:
        _write(cfg.folder / "figures" / f"{picture.name}.png", picture.png)
    _write(cfg.folder / "report.md", report.markdown(page).encode())
    _write(cfg.folder / "report.html", report.html(page).encode())
    _write(cfg.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())
    return summary


def summarise(
    cfg: Config,
    study: StudyConfig,
    trials: Sequence[TrialRecord],
    choices: Mapping[str, Choice] | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`; a number that JSON has none for is None.

    Raises:
        UsageError: a claim's metric is missing in some trial.
    """
    arms = measured.by_arm(trials)
    target = measured.target_of(cfg)
    targets = measured.targets_of(target, arms, len(study.seeds))
    table = measured.measure(study, arms, target, values_of(choices or {}) or {})
    if study.grid and targets:
        table |= measured.families(arms_of(study), table, targets[0])
    curves = {arm: _curves(own, study) for arm, own in arms.items()}
    verdicts = claims.judge(study.judged, table, study.seeds, curves)
    summary = {
        "study": cfg.name,
        "versions": _shared([trial.versions for trial in trials]),
        "git": ", ".join(sorted({trial.git for trial in trials})),
        "design": design(cfg, study, targets, choices or {}),
        "arms": table,
        "claims": [claim_entry(verdict) for verdict in verdicts],
    }
    return _without_nonfinite(summary)


def _curves(trials: Sequence[TrialRecord], study: StudyConfig) -> dict[str, list[Curve]]:
    """The curves that claims on shares speak of."""
    metrics = {claim.metric for claim in study.judged if claim.scale == "share"}
    return {metric: [trial.points.get(metric, {}) for trial in trials] for metric in metrics}


def design(
    cfg: Config,
    study: StudyConfig,
    targets: Sequence[float] | None,
    choices: Mapping[str, Choice],
) -> dict[str, Any]:
    """What was compared on what."""
    runs = arm_configs(cfg, values_of(choices))
    return {
        "data": cfg.data.name,
        "model": cfg.model.arch or cfg.model.name,
        "world_size": cfg.launcher.num_workers,
        "per_rank_batch": cfg.train.per_rank_batch,
        "steps": cfg.train.steps,
        "seeds": list(study.seeds),
        "split": "validation" if cfg.data.validation else "test",
        "virtual": cfg.train.virtual,
        "normalisation_batch": {a: measured.normalisation_batch(run) for a, run in runs.items()},
        "tuned": {arm: _tuned(study, choice) for arm, choice in choices.items()},
        "target": measured.middle(targets),
        "grid": study.grid,
        "families": {arm.name: arm.family for arm in arms_of(study)} if study.grid else {},
        "tier": study.tier if study.tiers else None,
        "primary_metric": study.primary_metric,
        "statement": study.statement,
        "later": study.later,
        "published": [asdict(table) for table in study.published],
    }


def _tuned(study: StudyConfig, choice: Choice) -> dict[str, Any]:
    """What the search chose for an arm, and the mean validation error of each value that it tried."""
    assert study.tune is not None
    errors = {f"{value:g}": sum(found) / len(found) for value, found in choice.errors.items()}
    return {study.tune.key: choice.value, "errors": errors, "at_an_end": choice.at_an_end}


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
