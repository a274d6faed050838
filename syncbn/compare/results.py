"""From finished trials to the files of a study: summary, parquet, figures, report.

Everything that a comparison writes is written here; each file appears whole under its name or not at all.
"""

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from syncbn.compare.report.figures.gallery import draw
from syncbn.compare.report.html import html
from syncbn.compare.report.markdown import markdown
from syncbn.compare.report.page import Page
from syncbn.compare.study.design import arm_configs, study_of
from syncbn.compare.study.preflight import free_keys
from syncbn.compare.study.records import TrialRecord, read_trials, refuse_undeclared, refuse_unlike
from syncbn.compare.study.repeat import repeat_command
from syncbn.compare.study.summarise import summarise
from syncbn.compare.study.tuning import chosen, tuned_values
from syncbn.config import Config, identity


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
    refuse_undeclared(trials, arm_configs(cfg, tuned_values(choices)))
    summary = summarise(cfg, study, trials, choices)
    pictures = draw(summary, trials)
    page = Page(
        summary=summary,
        question=study.question,
        command=repeat_command(cfg),
        config={**identity(cfg), "study": asdict(study)},
        pictures=pictures,
    )
    write_whole(cfg.folder / "metrics.parquet", parquet(trials))
    for picture in pictures:
        write_whole(cfg.folder / "figures" / f"{picture.name}.png", picture.png)
    write_whole(cfg.folder / "report.md", markdown(page).encode())
    write_whole(cfg.folder / "report.html", html(page).encode())
    write_whole(
        cfg.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode()
    )
    return summary


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


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` at once: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
