"""The command that repeats a study, as its report shows it.

It is computed from the config that ran, as the settings in which that differs from the study's YAML, so it includes
every override, wherever it was given.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from syncbn.compare.study.records import flat
from syncbn.compose import compose, config_files
from syncbn.config import Config

_PLACES = ("runs_dir", "tracking", "launcher.address")
"""Where things go, which is the reader's own business."""


def repeat_command(cfg: Config) -> str | None:
    """The shell command that runs the study of `cfg` again, None where no file in conf/study/ is it."""
    name = _study_file(cfg)
    if name is None:
        return None
    settings = [f"study={name}", *_differences(asdict(compose([f"study={name}"])), asdict(cfg))]
    return " ".join(["syncbn compare", *map(shlex.quote, settings)])


def _study_file(cfg: Config) -> str | None:
    """Name of the study file that asks the question of `cfg`."""
    for name, path in config_files("study").items():
        if cfg.study is not None and _question(path) == cfg.study.question:
            return name
    return None


def _question(path: Path) -> str | None:
    """What the study file asks; None where it cannot be read, which concerns only those who run it."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return None
    study = tree.get("study") if isinstance(tree, dict) else None
    return study.get("question") if isinstance(study, dict) else None


def _differences(base: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Overrides that turn `base` into `wanted`."""
    old, new = flat(base), flat(wanted)
    for key in [*new, *(old.keys() - new.keys())]:
        if key.startswith(_PLACES) or (key in old and old[key] == new.get(key, ...)):
            continue
        if key not in new:
            yield f"~{key}"
        else:
            yield f"{'' if key in old else '+'}{key}={hydra_value(new[key])}"


def hydra_value(value: Any) -> str:
    """`value` in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)
