"""The search before a study, the same for every arm: which value of one key suits it, on held-out samples.

The search has folders, seeds and a split of its own. Its trials never see the test set, and the study's trials never
see its seeds, so a value cannot be chosen for the test.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from syncbn.compare.measure import Measure, deciding
from syncbn.compare.study.design import SEARCH, Trial, study_of
from syncbn.compose import vary
from syncbn.config import Config, ProbeConfig, TuneConfig
from syncbn.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """What the search found for an arm."""

    value: float
    errors: dict[float, list[float]]
    """What the task decides by, of each value tried, one a seed of the search; none for an arm that follows another."""

    @property
    def at_an_end(self) -> bool:
        """Whether a value beyond those tried might have been better still."""
        return bool(self.errors) and self.value in (min(self.errors), max(self.errors))


def search(cfg: Config) -> list[Trial]:
    """The trials of the search, value by value; none where the study in `cfg` has no `tune`.

    Raises:
        UsageError: `cfg` has no study, or an arm's overrides cannot be used.
    """
    study = study_of(cfg)
    if study.tune is None:
        return []
    folder = str(cfg.folder / SEARCH)
    found = []
    for value in study.tune.values:
        for arm, overrides in study.arms.items():
            if arm in study.tune.follow:
                continue
            run = vary(cfg, [*overrides, *_settings(study.tune, value)])
            run = replace(run, runs_dir=folder, probe=ProbeConfig())
            name = f"{arm}_{value:g}"
            found += [
                Trial(name, seed, replace(run, name=f"{name}-{seed}", seed=seed))
                for seed in study.tune.seeds
            ]
    return found


def _settings(tune: TuneConfig, value: float) -> list[str]:
    """Overrides of a trial of the search: measured once, at its end, on what is held out."""
    steps = [] if tune.steps is None else [f"train.steps={tune.steps}"]
    held_out = f"data.validation={tune.validation!r}"
    return [f"{tune.key}={value!r}", held_out, "train.eval_every=0", "train.log_every=50", *steps]


def chosen(cfg: Config) -> dict[str, Choice]:
    """Each arm's choice, from the files that the search left; nothing where the study has no `tune`.

    The value with the best mean of what the task decides by wins, the smaller of equals. A diverged trial counts as a
    test error of 1, and where the task is no classification as infinitely bad.

    Raises:
        UsageError: a trial of the search is unfinished.
    """
    study = study_of(cfg)
    if study.tune is None:
        return {}
    choices = {
        arm: _best(_errors(cfg, study.tune, arm), deciding(cfg.task))
        for arm in study.arms
        if arm not in study.tune.follow
    }
    for arm, rule in study.tune.follow.items():
        leader, factor = followed(rule)
        choices[arm] = Choice(choices[leader].value * factor, {})
    return {arm: choices[arm] for arm in study.arms}


def followed(rule: str) -> tuple[str, float]:
    """The arm and the factor of a rule `arm*factor`.

    Raises:
        UsageError: a rule of another form.
    """
    leader, _, factor = rule.partition("*")
    try:
        return leader.strip(), float(factor or 1)
    except ValueError:
        raise UsageError(
            f"study.tune.follow: {rule!r} is not allowed: an arm, or arm*factor"
        ) from None


def tuned_values(choices: Mapping[str, Choice]) -> dict[str, float] | None:
    """What each arm runs with; None where nothing was searched for."""
    return {arm: choice.value for arm, choice in choices.items()} or None


def _errors(cfg: Config, tune: TuneConfig, arm: str) -> dict[float, list[float]]:
    return {
        value: [_error(cfg, f"{arm}_{value:g}-{seed}") for seed in tune.seeds]
        for value in tune.values
    }


def _error(cfg: Config, trial: str) -> float:
    path = cfg.folder / SEARCH / trial / "summary.json"
    try:
        final, decides = json.loads(path.read_text())["final"], deciding(cfg.task)
        return float(
            decides.worst
            if final.get("diverged") and decides.name not in final
            else final[decides.name]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"trial {trial} of the search in {path.parent.parent} is unfinished: run the study again"
        ) from error


def _best(errors: Mapping[float, list[float]], decides: Measure) -> Choice:
    def badness(value: float) -> tuple[float, float]:
        mean = decides.sign * sum(errors[value]) / len(errors[value])
        return (mean if math.isfinite(mean) else math.inf, value)

    return Choice(min(errors, key=badness), dict(errors))
