"""Fabricates the folders that trials leave behind, with the journal that real runs write.

`make_study` takes curves as functions of the step, so a test says what its arms did and nothing else.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from syncbn.compare import results
from syncbn.config import (
    ClaimConfig,
    Config,
    LauncherConfig,
    NormConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
    config_hash,
)
from syncbn.tracking import Journal

ErrorOf = Callable[[str, int, int], float]
"""Test error of (arm, seed, step)."""

VERSIONS = {"python": "3.11.2", "torch": "2.15.0", "syncbn": "0.1.0"}


def study_config(
    runs_dir: Path,
    arms: tuple[str, ...] = ("none", "local", "sync", "big_batch"),
    seeds: tuple[int, ...] = tuple(range(6)),
    claims: tuple[ClaimConfig, ...] = (),
    steps: int = 600,
    **train: float,
) -> Config:
    """A study of norm arms on two ranks of two samples."""
    return Config(
        name="demo",
        runs_dir=str(runs_dir),
        train=TrainConfig(steps=steps, per_rank_batch=2, log_every=10, eval_every=100, **train),
        launcher=LauncherConfig(num_workers=2),
        study=StudyConfig(
            question="Does synchronising mend it?",
            seeds=list(seeds),
            arms={arm: [f"norm={arm}"] for arm in arms},
            claims=list(claims),
        ),
    )


def trial_config(cfg: Config, arm: str, seed: int) -> RunConfig:
    """The config that the trial of `arm` under `seed` records."""
    return RunConfig(
        name=f"{arm}-{seed}",
        seed=seed,
        runs_dir=str(cfg.folder / "trials"),
        model=cfg.model,
        data=cfg.data,
        norm=NormConfig(name=arm),
        optim=cfg.optim,
        train=cfg.train,
        launcher=cfg.launcher,
        tracking=cfg.tracking,
    )


def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write results without figures, for tests that read numbers alone: to draw them is most of the work."""
    monkeypatch.setattr(results, "draw", lambda summary, trials: [])


def make_study(cfg: Config, error_of: ErrorOf, loss_noise: float = 0.3) -> None:
    """Write every trial of `cfg`, with the test errors that `error_of` gives and a loss to match."""
    for arm in cfg.study.arms:
        for seed in cfg.study.seeds:
            curve = {step: error_of(arm, seed, step) for step in _marks(cfg, cfg.train.eval_every)}
            write_trial(trial_config(cfg, arm, seed), curve, loss_noise)


def write_trial(cfg: RunConfig, errors: Mapping[int, float], loss_noise: float = 0.3) -> None:
    """Write one finished trial whose evaluations gave `errors`."""
    journal = Journal(cfg.folder / "journal.jsonl")
    _start(journal, cfg)
    rng = np.random.default_rng(cfg.seed)
    loss = 0.0
    for step in _marks(cfg, cfg.train.log_every):
        level = np.interp(step, list(errors), [3 * error for error in errors.values()])
        loss = float((2.3 * np.exp(-step / 60) + level) * np.exp(loss_noise * rng.normal()))
        journal.metrics(step, {"train_loss": loss, "lr": 0.05})
        if step in errors:
            journal.metrics(step, {"test_error": errors[step], "test_loss": 3 * errors[step]})
    summary = _summary(cfg, {"train_loss": loss, "test_error": errors[cfg.train.steps]})
    journal.event("end", status="finished", summary=summary, error=None)
    journal.close()
    (cfg.folder / "summary.json").write_text(json.dumps(summary))


def _start(journal: Journal, cfg: RunConfig) -> None:
    journal.event(
        "start",
        config=asdict(cfg),
        config_hash=config_hash(cfg),
        world_size=cfg.num_ranks,
        versions=VERSIONS,
        samples=f"samples of seed {cfg.seed}",
        git="0123abc",
        attempt=1,
    )


def _summary(cfg: RunConfig, final: dict[str, float]) -> dict:
    return {
        "final": final,
        "steps": cfg.train.steps,
        "seconds": (1.3 if cfg.norm.name == "sync" else 1.0) + 0.05 * (cfg.seed % 3),
        "world_size": cfg.num_ranks,
        "config_hash": config_hash(cfg),
    }


def _marks(cfg: RunConfig, every: int) -> list[int]:
    steps = list(range(every, cfg.train.steps + 1, every))
    return steps if steps and steps[-1] == cfg.train.steps else [*steps, cfg.train.steps]


def demo_error(arm: str, seed: int, step: int) -> float:
    """Test errors like those of the demo study: local breaks, sync and the big batch agree."""
    rng = np.random.default_rng(1000 * seed)
    low, high = {"none": (0.06, 0.27), "local": (0.31, 0.41)}.get(arm, (0.056, 0.064))
    end = low + (high - low) * rng.uniform() + (0.001 * rng.normal() if arm == "sync" else 0)
    noise = np.random.default_rng(1000 * seed + step).normal() * 0.02 * (600 - step) / 600
    return float(np.clip(end + (0.9 - end) * np.exp(-step / 110) * (step < 600) + noise, 0.01, 1))


DEMO_CLAIMS = (
    ClaimConfig(
        name="sync_beats_local",
        arm="sync",
        against="local",
        kind="less",
        threshold=-0.20,
        statement="Synchronised statistics beat each rank's own by more than 20 points.",
    ),
    ClaimConfig(
        name="sync_equals_big_batch",
        arm="sync",
        against="big_batch",
        kind="equivalent",
        threshold=0.02,
        statement="Two synchronised ranks do as well as one process on the whole batch.",
    ),
)
