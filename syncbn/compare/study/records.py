"""The trials of a study as their folders hold them, and the refusal to compare unlike ones.

The comparison reads the configs that trials recorded when they ran, not the one it was called with, so a folder left
over from other settings is found.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncbn.compare.study.design import TRIALS, arms_of, study_of
from syncbn.config import Config, RunConfig, flat, identity_of
from syncbn.errors import UsageError
from syncbn.tracking.journal import read_journal


@dataclass(frozen=True)
class TrialRecord:
    """What one trial, an arm under a seed, left behind."""

    arm: str
    seed: int
    config: dict[str, Any]
    """The trial's RunConfig as a tree."""
    versions: dict[str, str]
    git: str
    final: dict[str, float]
    """Metrics at the end: `test_error` (a fraction), `train_loss`, ..."""
    steps: int
    seconds: float
    world_size: int
    """Ranks that trained."""
    samples: str
    """A digest of the samples that it was to see, in their order."""
    points: dict[str, dict[int, float]]
    """Metric -> step -> value, as the journal has them; a step written twice keeps its later value."""

    @property
    def name(self) -> str:
        """The trial's folder name."""
        return f"{self.arm}-{self.seed}"

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite; a test error is 1 then, other measures and times have no number."""
        return bool(self.final.get("diverged"))


def read_trials(cfg: Config) -> list[TrialRecord]:
    """All trials of the study in `cfg`, arm by arm in the order of its seeds.

    Raises:
        UsageError: `cfg` has no study, or some of its trials are unfinished; names them.
    """
    study = study_of(cfg)
    folders = {
        (arm.name, seed): cfg.folder / TRIALS / f"{arm.name}-{seed}"
        for arm in arms_of(study)
        for seed in study.seeds
    }
    unfinished = [f.name for f in folders.values() if not (f / "summary.json").is_file()]
    if unfinished:
        raise UsageError(
            f"{len(unfinished)} of {len(folders)} trials in {cfg.folder / TRIALS} are unfinished: "
            f"{', '.join(unfinished)}; run the study again, finished trials are kept"
        )
    return [read_trial(folder, arm, seed) for (arm, seed), folder in folders.items()]


def read_trial(folder: Path, arm: str, seed: int) -> TrialRecord:
    """The finished trial in `folder`.

    Raises:
        UsageError: its journal has no `start` record, or `summary.json` is not this project's.
    """
    start, points = _read_journal(folder / "journal.jsonl")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return TrialRecord(
            arm=arm,
            seed=seed,
            config=start["config"],
            versions=start["versions"],
            git=start["git"],
            final={metric: float(value) for metric, value in summary["final"].items()},
            steps=int(summary["steps"]),
            seconds=float(summary["seconds"]),
            world_size=int(summary["world_size"]),
            samples=start["samples"],
            points=points,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder} is no finished trial: {error!r}") from error


def _read_journal(path: Path) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """The last attempt's `start` record (empty where there is none) and all points of a journal."""
    start: dict[str, Any] = {}
    points: dict[str, dict[int, float]] = {}
    for record in read_journal(path) if path.is_file() else ():
        if record.get("event") == "start":
            start = record
        for metric, value in record.get("metrics", {}).items():
            points.setdefault(metric, {})[record["step"]] = float(value)
    return start, points


def refuse_unlike(trials: Sequence[TrialRecord], factor: Sequence[str]) -> None:
    """Refuse trials that differ in more than they may, or that ended before they were done.

    Trials of one arm may differ in their seed alone; trials of different arms also in `factor`, config
    groups or dotted keys. Trials of one seed must have begun with the same samples.

    Raises:
        UsageError: two trials differ elsewhere, or one has fewer steps than its config; names both values.
    """
    for trial in trials:
        _refuse_unfinished(trial)
    firsts = {trial.arm: trial for trial in reversed(trials)}
    for trial in trials:
        _refuse_difference(firsts[trial.arm], trial, ("seed",), "two seeds of one arm")
        _refuse_difference(trials[0], trial, ("seed", *factor), f"study.factor={list(factor)}")
    _refuse_unpaired(trials)


def refuse_undeclared(trials: Sequence[TrialRecord], declared: Mapping[str, RunConfig]) -> None:
    """Refuse a trial that ran another config than the study declares for its arm, such as another arm's.

    Args:
        trials: as their folders hold them.
        declared: the run of each arm; its seed does not matter.

    Raises:
        UsageError: names the trial, the key and both values.
    """
    for trial in trials:
        found = difference(asdict(declared[trial.arm]), trial.config, ("seed",))
        if found is None and trial.config["seed"] != trial.seed:
            found = f"seed ({trial.seed} against {trial.config['seed']})"
        if found is not None:
            raise UsageError(
                f"trial {trial.name} did not run what the study declares for arm {trial.arm!r}: they differ in "
                f"{found}; remove its folder and run the study again"
            )


def _refuse_unpaired(trials: Sequence[TrialRecord]) -> None:
    """Raise `UsageError` where two trials of one seed saw other samples: their difference would mix in chance."""
    firsts: dict[int, TrialRecord] = {}
    for trial in trials:
        first = firsts.setdefault(trial.seed, trial)
        if trial.samples != first.samples:
            raise UsageError(
                f"trials {first.name} and {trial.name} have one seed but saw other samples (their journals' `samples` "
                f"are {first.samples!r} and {trial.samples!r}): they are no pair, the comparison is refused"
            )


def _refuse_unfinished(trial: TrialRecord) -> None:
    """Raise `UsageError` where `trial` took fewer steps than it was to, and no rule of its config ended it."""
    train = trial.config["train"]
    may_end_early = (
        trial.diverged or train["target_error"] is not None or train["patience"] is not None
    )
    if trial.steps != train["steps"] and not may_end_early:
        raise UsageError(
            f"trial {trial.name} has {trial.steps} steps of train.steps={train['steps']}: the comparison is refused; "
            f"remove its folder and run the study again"
        )


def _refuse_difference(
    one: TrialRecord, other: TrialRecord, free: Sequence[str], reason: str
) -> None:
    found = difference(one.config, other.config, free)
    if found is not None:
        raise UsageError(
            f"trials {one.name} and {other.name} differ in {found}, which {reason} does not allow: "
            "the comparison is refused"
        )


def difference(one: Mapping[str, Any], other: Mapping[str, Any], free: Sequence[str]) -> str | None:
    """The first key, with both values, in which two configs' identities differ outside `free`; None where in none.

    Args:
        one: a RunConfig as a tree.
        other: likewise.
        free: groups or dotted keys that may differ.
    """
    left, right = (flat(identity_of(config)) for config in (one, other))
    for key in sorted(left.keys() | right.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        if left.get(key) != right.get(key):
            return f"{key} ({left.get(key)!r} against {right.get(key)!r})"
    return None
