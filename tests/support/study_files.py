"""Fabricates the folders that a run or a study leaves behind, for tests of what takes them to MLflow."""

import json
import struct
import zlib
from dataclasses import asdict
from pathlib import Path

from syncbn.config import Config, RunConfig, StudyConfig, TrackingConfig, TrainConfig, config_hash
from syncbn.tracking import Journal

STEPS = tuple(range(10, 601, 10))
ARMS = {"local": 0.35, "sync": 0.06}
"""Arm to its test error in the end."""


def study_config(runs_dir: Path, uri: str | None = None) -> Config:
    """Two arms, two seeds."""
    return Config(
        name="demo",
        runs_dir=str(runs_dir),
        train=TrainConfig(steps=600, per_rank_batch=2),
        tracking=TrackingConfig(uri=uri),
        study=StudyConfig(
            question="Does it help?", seeds=[0, 1], arms={arm: [f"norm={arm}"] for arm in ARMS}
        ),
    )


def run_config(
    runs_dir: Path, name: str = "run", seed: int = 0, uri: str | None = None
) -> RunConfig:
    """One run."""
    return RunConfig(name=name, seed=seed, runs_dir=str(runs_dir), tracking=TrackingConfig(uri=uri))


def begin(cfg: RunConfig, step: int = 0) -> Journal:
    """The journal of a run that has started at `step`."""
    journal = Journal(cfg.folder / "journal.jsonl")
    journal.begin(
        step,
        config=asdict(cfg),
        config_hash=config_hash(cfg),
        world_size=2,
        versions={"torch": "2.15.0"},
        git="0123abc",
    )
    return journal


def end(journal: Journal, cfg: RunConfig, error: float = 0.1, status: str = "finished") -> None:
    """The end of a run, in its journal and its summary."""
    summary = {"final": {"test_error": error}, "steps": 600, "seconds": 1.5, "world_size": 2}
    journal.event("end", status=status, summary=summary, error=None)
    journal.close()
    (cfg.folder / "summary.json").write_text(json.dumps(summary))


def write_trial(cfg: RunConfig, error: float = 0.1, status: str = "finished") -> Path:
    """A whole run whose test error falls to `error`; returns its folder."""
    journal = begin(cfg)
    for step in STEPS:
        journal.metrics(step, {"train_loss": 1 / step, "lr": 0.05})
        if step % 100 == 0:
            journal.metrics(step, {"test_error": error + 10 / step})
    end(journal, cfg, error, status)
    return cfg.folder


def write_trials(cfg: Config) -> list[Path]:
    """All trials of the study; returns their folders."""
    trials = cfg.folder / "trials"
    return [
        write_trial(run_config(trials, f"{arm}-{seed}", seed), error + seed / 100)
        for arm, error in ARMS.items()
        for seed in cfg.study.seeds
    ]


def write_results(cfg: Config) -> None:
    """Summary, report and a figure, as a comparison leaves them."""
    claim = {"name": "sync_beats_local", "effect": -0.29, "verdict": "REPRODUCED"}
    summary = {
        "study": cfg.name,
        "versions": {"torch": "2.15.0"},
        "git": "0123abc",
        "design": {"steps": 600, "seeds": cfg.study.seeds},
        "arms": {arm: {"test_error": [error, error + 0.01]} for arm, error in ARMS.items()},
        "claims": [claim],
    }
    table = "| claim | verdict |\n| --- | --- |\n| sync_beats_local | REPRODUCED |"
    (cfg.folder / "summary.json").write_text(json.dumps(summary))
    (cfg.folder / "report.md").write_text(
        f"# demo\n\n{table}\n\n## Figures\n\n![x](figures/x.png)\n"
    )
    (cfg.folder / "report.html").write_text("<h1>demo: the report</h1>")
    (cfg.folder / "metrics.parquet").write_bytes(b"PAR1")
    (cfg.folder / "figures").mkdir(exist_ok=True)
    (cfg.folder / "figures" / "convergence.png").write_bytes(png(320, 200))


def png(width: int, height: int) -> bytes:
    """A picture of one blue, `width` x `height` pixels."""
    pixels = zlib.compress((b"\0" + b"\x20\x60\xc0" * width) * height)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
