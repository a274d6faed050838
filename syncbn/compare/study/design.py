"""What a study runs: its arms, its trials, and the waves in which processes take them.

All of it follows from the config and from what the search chose. Neither torch nor a launcher is imported, so that a
plan can be printed, and a study refused, before anything starts.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from syncbn.compare.measure import deciding
from syncbn.compose import vary
from syncbn.config import ClaimConfig, Config, RunConfig, StudyConfig
from syncbn.errors import UsageError

TRIALS, SEARCH = "trials", "tuning"
"""Folders of a study: its trials, and those of the search before them."""


@dataclass(frozen=True)
class Trial:
    """One arm under one seed."""

    arm: str
    seed: int
    config: RunConfig
    """The run; its folder is `<study folder>/trials/<arm>-<seed>`."""

    @property
    def name(self) -> str:
        """The trial's folder name."""
        return f"{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Arm:
    """An arm as it runs: one of `study.arms`, in one cell of `study.grid` where there is one."""

    name: str
    family: str
    """The arm of `study.arms` that it is."""
    overrides: tuple[str, ...]


def study_of(cfg: Config) -> StudyConfig:
    """The study in `cfg`, its metrics named.

    Raises:
        UsageError: there is none, or its task cannot be built.
    """
    if cfg.study is None:
        raise UsageError("study is not set: name one with study=NAME")
    return about_the_task(cfg.study, cfg)


def about_the_task(study: StudyConfig, cfg: RunConfig) -> StudyConfig:
    """`study`, with what the task decides by where it or a claim names no metric."""
    decides = deciding(cfg.task).name
    claims = [replace(claim, metric=claim.metric or decides) for claim in study.claims]
    return replace(study, claims=claims, primary_metric=study.primary_metric or decides)


def arms_of(study: StudyConfig) -> list[Arm]:
    """All arms in order, each in every cell of the grid: `none`, or `none_0.05_0.1`, `none_0.05_1`, ..."""
    keys = list(study.grid)
    cells = list(itertools.product(*study.grid.values()))
    return [
        Arm("_".join([arm, *(f"{v:g}" for v in cell)]), arm, (*overrides, *_settings(keys, cell)))
        for arm, overrides in study.arms.items()
        for cell in cells
    ]


def _settings(keys: Sequence[str], values: Sequence[float]) -> list[str]:
    return [f"{key}={value!r}" for key, value in zip(keys, values, strict=True)]


def arm_configs(cfg: Config, tuned: Mapping[str, float] | None = None) -> dict[str, RunConfig]:
    """The run of each arm, in order; with what the search chose for it, where it has.

    Raises:
        UsageError: `cfg` has no study, or an arm's overrides cannot be used.
    """
    study = study_of(cfg)
    chosen = {
        arm: [] if tuned is None or study.tune is None else _settings([study.tune.key], [value])
        for arm, value in (tuned or dict.fromkeys(study.arms, 0.0)).items()
    }
    return {
        arm.name: _of_a_trial(vary(cfg, [*arm.overrides, *chosen[arm.family]]))
        for arm in arms_of(study)
    }


def _of_a_trial(run: RunConfig) -> RunConfig:
    """`run` without a checkpoint of its best evaluation, unless it asks for one: a study reads measurements alone."""
    return replace(run, train=replace(run.train, keep_best=bool(run.train.keep_best)))


def trials(cfg: Config, tuned: Mapping[str, float] | None = None) -> list[Trial]:
    """All trials of the study in `cfg`, seed by seed, so that an interrupted study has whole pairs.

    Args:
        cfg: with a study.
        tuned: arm to the value that the search chose for it.

    Raises:
        UsageError: `cfg` has no study, or an arm's overrides cannot be used.
    """
    arms = arm_configs(cfg, tuned)
    folder = str(cfg.folder / TRIALS)
    return [
        Trial(arm, seed, replace(run, name=f"{arm}-{seed}", seed=seed, runs_dir=folder))
        for seed in study_of(cfg).seeds
        for arm, run in arms.items()
    ]


def arms_in(claim: ClaimConfig) -> list[str]:
    """The arms that `claim` speaks of, each once."""
    named = [claim.arm, claim.against, *claim.beyond, *claim.along]
    return list(dict.fromkeys(arm for arm in named if arm))


def num_trials(study: StudyConfig) -> int:
    """How many trials `study` has, its search included."""
    searched = 0
    if study.tune is not None:
        arms = len(study.arms) - len(study.tune.follow)
        searched = arms * len(study.tune.values) * len(study.tune.seeds)
    return len(arms_of(study)) * len(study.seeds) + searched


def waves(trials: Sequence[Trial], processes: int | None) -> list[tuple[int, list[Trial]]]:
    """How many processes take which trials, one wave after the other.

    Trials on several ranks need a group of just so many. Those of one process are dealt out over the smallest such
    group, once it is through with its own, or else over a pool of `processes`; None means one a core.
    """
    by_size: dict[int, list[Trial]] = {}
    for trial in trials:
        by_size.setdefault(trial.config.num_ranks, []).append(trial)
    alone = by_size.pop(1, [])
    sizes = sorted(by_size)
    if not sizes:
        pool = processes or len(os.sched_getaffinity(0))
        return [(min(pool, len(alone)), alone)] if alone else []
    by_size[sizes[0]] += alone
    return [(size, by_size[size]) for size in sizes]


def most_processes(cfg: Config) -> int:
    """The most processes that any wave of the study in `cfg` takes."""
    return max(size for size, _ in waves(trials(cfg), cfg.launcher.processes))
