"""What a sweep runs: its trials, from settings of which some have several values.

As in a study, all of it follows from the settings, and neither torch nor a launcher is imported: the whole grid is
composed and checked before anything starts.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from syncbn.compare.report.words.sweep import short_keys
from syncbn.compare.study.design import TRIALS, Trial, waves
from syncbn.compose import compose_grid
from syncbn.config import Config, RunConfig
from syncbn.errors import UsageError
from syncbn.overrides import Point

LONGEST_NAME = 80
"""Of a trial's folder without its seed, in characters."""


@dataclass(frozen=True)
class SweepTrial(Trial):
    """One point of the grid. `arm` is its values but the seed, shortened to a folder's name."""

    settings: Mapping[str, Any]
    """Swept key to its value here."""
    texts: Mapping[str, str]
    """Swept key to its value as an override has it."""

    @property
    def command(self) -> str:
        """The swept settings as one gives them, not quoted for a shell."""
        return " ".join(f"{key}={text}" for key, text in self.texts.items())


@dataclass(frozen=True)
class Sweep:
    """All trials of a sweep."""

    config: Config
    """What they have in common, with the values of the first; its folder is the sweep's."""
    overrides: tuple[str, ...]
    """The settings as they were given."""
    fixed: tuple[str, ...]
    """Those with one value."""
    axes: Mapping[str, list[Any]]
    """Swept key to its values, in the order given."""
    trials: tuple[SweepTrial, ...]

    @property
    def most_processes(self) -> int:
        """The most processes that any wave takes."""
        return max(size for size, _ in waves(self.trials, self.config.launcher.processes))


def sweep_of(overrides: Sequence[str], forced: Sequence[str] = ()) -> Sweep:
    """The sweep that `overrides` describe, every trial composed and checked.

    Its name is `name` where that is given, else that of a run with `-sweep`, so that both can stand in one folder.

    Args:
        overrides: settings, some with several values.
        forced: settings of the launch, which are no part of the command.

    Raises:
        UsageError: a grid that cannot be run, or a trial whose config is not allowed; names it.
    """
    grid, configs = compose_grid([*overrides, *forced])
    found = list(configs)
    if any(cfg.tracking.log_model for _, cfg in found):
        raise UsageError(
            "tracking.log_model=True is not allowed in a sweep, whose trials log no model: train the best again with "
            "`syncbn train`, its settings and a name of its own"
        )
    named = any(setting.partition("=")[0] == "name" for setting in overrides)
    first = found[0][1]
    base = first if named else replace(first, name=f"{first.name}-sweep")
    trials = tuple(_trial(base, point, cfg) for point, cfg in found)
    _refuse_twice(trials)
    axes = {key: [value.plain for value in values] for key, values in grid.axes.items()}
    fixed = tuple(setting for setting in grid.fixed if setting not in forced)
    return Sweep(base, tuple(overrides), fixed, axes, trials)


def _trial(base: Config, point: Point, cfg: Config) -> SweepTrial:
    texts = {key: value.text for key, value in point.items()}
    names = short_keys(list(texts))
    arm = trial_name({names[key]: text for key, text in texts.items() if key != "seed"})
    folder = str(base.folder.absolute() / TRIALS)
    run = replace(_run(cfg), name=f"{arm}-{cfg.seed}", runs_dir=folder)
    plain = {key: value.plain for key, value in point.items()}
    return SweepTrial(arm, cfg.seed, run, plain, texts)


def _run(cfg: Config) -> RunConfig:
    """`cfg` without a study."""
    return RunConfig(**{key: value for key, value in vars(cfg).items() if key != "study"})


def trial_name(texts: Mapping[str, str]) -> str:
    """One folder name for these values, which no other values have: `lr_0.01-model_cnn`.

    Where signs had to be left out, it ends in a digest of the whole.
    """
    whole = "-".join(f"{key}_{text}" for key, text in texts.items()) or "seed"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", whole).strip("._-")
    if plain == whole and len(whole) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{plain[: LONGEST_NAME - 9]}-{digest}"


def _refuse_twice(trials: Sequence[SweepTrial]) -> None:
    """Raise `UsageError` where two trials are one and the same, as with optim.lr=0.1,0.10, or have one folder."""
    seen: dict[str, SweepTrial] = {}
    for trial in trials:
        for mark in (repr(asdict(trial.config) | {"name": ""}), trial.name):
            twin = seen.setdefault(mark, trial)
            if twin is not trial:
                raise UsageError(
                    f"trials {twin.command} and {trial.command} are the same: give each value once"
                )
