"""Which studies a tier has, in which order, and with which settings each runs.

A study declares this itself (`study.tiers`, `study.order`, `study.fast`), so a new one is a file in conf/study/ and no
list of them exists. The fast tier is the same study with other overrides under another name, `<study>-fast`, so the two
never share trials.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from syncbn.config import StudyConfig
from syncbn.errors import UsageError

FAST, FULL = TIERS = ("fast", "full")


@dataclass(frozen=True)
class Declared:
    """What a study's file says of when and how it runs."""

    name: str
    """The folder that the study runs in."""
    question: str
    order: int
    tiers: tuple[str, ...]
    fast: tuple[str, ...]
    budget_s: float


@dataclass(frozen=True)
class Launch:
    """One study as a tier runs it."""

    study: str
    """Its file in conf/study/, without the suffix."""
    name: str
    """The folder that it runs in, under runs_dir."""
    question: str
    overrides: tuple[str, ...]
    """Its settings, before the user's own."""
    order: int
    budget_s: float
    """How long it may take, 0 where nothing is declared."""


def declared(files: Iterable[Path]) -> dict[str, Declared]:
    """The studies in `files` (those in conf/study/), by the name of their file.

    Raises:
        UsageError: a file cannot be read as YAML, or holds no mapping.
    """
    return {path.stem: _declared(path) for path in files}


def _declared(path: Path) -> Declared:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} is no study: a YAML mapping is needed, with a key `study`")
    study: Mapping[str, Any] = tree.get("study") or {}
    return Declared(
        name=str(tree.get("name", path.stem)),
        question=str(study.get("question", "")),
        order=int(study.get("order", StudyConfig.order)),
        tiers=tuple(study.get("tiers") or ()),
        fast=tuple(study.get("fast") or ()),
        budget_s=float(study.get("budget_s", StudyConfig.budget_s)),
    )


def studies_of(
    tier: str, studies: Mapping[str, Declared], names: Sequence[str] = ()
) -> list[Launch]:
    """The studies of `tier` in their order; with `names` exactly those, whatever tiers they belong to.

    Raises:
        UsageError: a name that is no study, or a tier without any.
    """
    for name in names:
        if name not in studies:
            raise UsageError(f"study {name!r} is not in conf/study/: {', '.join(studies)}")
    chosen = [n for n, s in studies.items() if (n in names if names else tier in s.tiers)]
    if not chosen:
        raise UsageError(f"no study in conf/study/ has {tier!r} among its study.tiers")
    chosen.sort(key=lambda name: (studies[name].order, name))
    return [_launch(tier, name, studies[name]) for name in chosen]


def _launch(tier: str, file: str, study: Declared) -> Launch:
    fast = tier == FAST
    shortened = (f"name={file}-fast", f"study.tier={FAST}", *study.fast)
    return Launch(
        study=file,
        name=f"{file}-fast" if fast else study.name,
        question=study.question,
        overrides=(f"study={file}", *(shortened if fast else ())),
        order=study.order,
        budget_s=0.0 if fast else study.budget_s,
    )
