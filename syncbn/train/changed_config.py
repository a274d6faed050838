"""What may be another in a config that continues a run: settings that change none of its numbers, and more steps.

A checkpoint holds a hash alone. The config behind it stands in the journal, in the record with which an attempt began,
so that what differs can be named.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncbn.config import (
    RunConfig,
    differences,
    identity_of,
    resume_hash,
    resume_hash_of,
    resume_identity_of,
)
from syncbn.errors import CheckpointError
from syncbn.tracking import read_journal

_FREE = ("train.log_every", "train.agree_every")
_APART_FROM_STEPS = ("constant", "exponential")
"""Schedules that do not depend on how many steps there are."""
_REMEDY = "give this run another name, or train.resume=false"


def accept_changes(cfg: RunConfig, folder: Path, saved_hash: str, saved_step: int) -> list[str]:
    """What of the settings is another than when a checkpoint was saved, to tell the user; empty where nothing is.

    Args:
        cfg: the run that is to continue.
        folder: where it lies.
        saved_hash: `resume_hash` of the checkpoint.
        saved_step: steps that it has done.

    Raises:
        CheckpointError: something that decides numbers; names the keys with both values.
    """
    if saved_hash == resume_hash(cfg):
        return []
    before = _started_with(folder, lambda start: resume_hash_of(start["config"]) == saved_hash)
    if before is None:
        raise CheckpointError(
            f"{folder} was made with config {saved_hash}, this run has {resume_hash(cfg)}: {_REMEDY}"
        )
    changed = differences(resume_identity_of(before), resume_identity_of(asdict(cfg)))
    refused = {k: values for k, values in changed.items() if not _may_change(k, cfg, saved_step)}
    if refused:
        raise CheckpointError(
            f"{folder} was made with other settings: {_in_words(refused, cfg)}: {_REMEDY}"
        )
    return [f"resuming with another setting: {_in_words({k: changed[k]}, cfg)}" for k in changed]


def changes_since(cfg: RunConfig, finished_hash: str) -> "Changes | None":
    """What is another in `cfg` than in the finished run of this `config_hash`; None where its journal does not say."""
    before = _started_with(cfg.folder, lambda start: start.get("config_hash") == finished_hash)
    if before is None:
        return None
    return Changes(cfg, differences(identity_of(before), identity_of(asdict(cfg))))


@dataclass(frozen=True)
class Changes:
    """Settings that are another in `cfg` than before: by dotted key both values."""

    cfg: RunConfig
    by_key: Mapping[str, tuple[Any, Any]]

    def allowed_from(self, step: int) -> bool:
        """Whether none of them changes the numbers of the run from `step` on."""
        return all(_may_change(key, self.cfg, step) for key in self.by_key)

    @property
    def give_more_steps(self) -> bool:
        """Whether the run gets a longer budget."""
        before, now = self.by_key.get("train.steps", (0, 0))
        return now > before

    def __str__(self) -> str:
        """Keys with both values."""
        return _in_words(self.by_key, self.cfg)


def _in_words(changed: Mapping[str, tuple[Any, Any]], cfg: RunConfig) -> str:
    spread = f" (over which optim.schedule={cfg.optim.schedule} spreads)"
    why = {} if cfg.optim.schedule in _APART_FROM_STEPS else {"train.steps": spread}
    return "; ".join(
        f"{key} was {old!r}, is {new!r}{why.get(key, '')}" for key, (old, new) in changed.items()
    )


def _started_with(
    folder: Path, fits: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any] | None:
    """The config of the newest attempt of the run in `folder` whose `start` record fits."""
    journal = folder / "journal.jsonl"
    records = list(read_journal(journal)) if journal.is_file() else []
    starts = [r for r in records if r.get("event") == "start" and "config" in r]
    return next((start["config"] for start in reversed(starts) if fits(start)), None)


def _may_change(key: str, cfg: RunConfig, step: int) -> bool:
    """Whether `key` can have another value from `step` on without a change to the numbers of the run."""
    if key == "train.eval_every":
        # An evaluation may end the run, and averages the statistics of `local_avg`.
        ends = cfg.train.patience is not None or cfg.train.target_error is not None
        return not ends and cfg.norm.name != "local_avg"
    if key == "train.steps":
        return cfg.optim.schedule in _APART_FROM_STEPS and cfg.train.steps >= step
    return key in _FREE
