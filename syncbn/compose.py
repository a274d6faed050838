"""From command-line overrides to a checked `Config`: the one place that talks to Hydra.

Hydra's compose API is used rather than `@hydra.main`, because every failure must leave as one line with exit
code 2, nothing may be written before the config is known to be good, and two ranks must not make two folders.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.checks import check
from syncbn.config import Config, RunConfig
from syncbn.errors import UsageError

ENV_ALLOWED = ("HOME", "USER", "TMPDIR", "SYNCBN_DATA_ROOT")
"""Environment variables that a config may read through `${oc.env:NAME}`."""

RENAMED = {"dtype": "train.precision"}
"""Keys that have another name now, by their last part."""

ConfigStore.instance().store("schema", node=Config)


def config_folder() -> Path:
    """The folder of config groups: `SYNCBN_CONF` where it is set, else `conf/` beside the package."""
    return Path(os.environ.get("SYNCBN_CONF", Path(__file__).parents[1] / "conf")).resolve()


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `overrides` (Hydra's `key=value` grammar) make of `conf/config.yaml`, checked.

    Raises:
        UsageError: an unknown key (with the nearest known one), a value of the wrong type or range, an
            unknown group option (with the known ones), broken YAML, `_target_`, `hydra.*`, or an
            environment variable outside `ENV_ALLOWED`.
    """
    refuse_unsafe(overrides)
    folder = config_folder()
    if not (folder / "config.yaml").is_file():
        raise UsageError(
            f"no config.yaml in {folder}: set SYNCBN_CONF to the project's conf/ folder"
        )
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            tree = hydra_compose("config", overrides=[*map(_with_new_names, overrides)])
        _refuse_environment(tree)
        cfg = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(_one_line(error)) from error
    assert isinstance(cfg, Config)
    check(cfg)
    return cfg


def _with_new_names(override: str) -> str:
    """`override` as Hydra takes it where it adds names of the user's own to the schema: parameter groups."""
    return f"++{override}" if override.startswith("optim.groups") else override


def vary(cfg: Config, overrides: Sequence[str]) -> RunConfig:
    """The run of `cfg` with an arm's `overrides`: groups (`norm=local`) and dotted keys (`optim.lr=0.1`).

    A group's file is laid over what `cfg` has, so that settings it does not mention stay as the study has them.

    Raises:
        UsageError: as `compose`.
    """
    refuse_unsafe(overrides)
    tree = OmegaConf.structured(cfg)
    try:
        for override in overrides:
            key, value = override.split("=", 1)
            if (config_folder() / key).is_dir():
                tree[key] = OmegaConf.merge(tree[key], _group(key, value))
            else:
                tree.merge_with_dotlist([override])
        varied = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from error
    assert isinstance(varied, Config)
    check(varied)
    return RunConfig(**{field.name: getattr(varied, field.name) for field in fields(RunConfig)})


def _group(group: str, option: str) -> DictConfig:
    """The file of `option` in a config group.

    Raises:
        UsageError: there is none; names those there are.
    """
    path = config_folder() / group / f"{option}.yaml"
    if not path.is_file():
        options = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UsageError(f"{group}={option} is not allowed: one of {options}")
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    return tree


def refuse_unsafe(overrides: Sequence[str]) -> None:
    """Raise `UsageError` for overrides that could reach beyond the schema: Hydra's own keys, `_target_`."""
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if override.startswith("-"):
            raise UsageError(f"unknown option {override!r}: settings are given as key=value")
        if "=" not in override and not override.startswith("~"):
            raise UsageError(f"{override!r} is not a setting: give key=value")
        if override.startswith("+") and not key.startswith("study.arms."):
            raise UsageError(f"unknown key {key!r}{_did_you_mean(key)}")
        if key.startswith("hydra") or "_target_" in override:
            raise UsageError(
                f"{override!r} is not allowed: Hydra's own settings and _target_ are refused"
            )


def _refuse_environment(tree: DictConfig) -> None:
    """Raise `UsageError` where a value would read an environment variable that is not on the list."""
    text = OmegaConf.to_yaml(tree, resolve=False)
    for resolver, argument in re.findall(r"\$\{\s*([a-z][\w.]*)\s*:\s*([^},]*)", text):
        if resolver != "oc.env" or argument.strip() not in ENV_ALLOWED:
            raise UsageError(
                f"${{{resolver}:{argument}}} is not allowed: only oc.env of {', '.join(ENV_ALLOWED)}"
            )


def _one_line(error: Exception) -> str:
    """Hydra's message on one line, with its cause, and with the nearest known key where a key is unknown."""
    cause = error.__cause__
    text = str(error) if cause is None else f"{error}: {cause}"
    lines = [line.strip() for line in text.split("Config search path")[0].splitlines()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=")))
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)'", text)
    return text.strip() + (_did_you_mean(unknown.group(1) or unknown.group(2)) if unknown else "")


def _did_you_mean(key: str) -> str:
    near = nearest_key(key.rsplit(".", 1)[-1])
    return f"; did you mean {near!r}?" if near else ""


def known_keys(tree: Any = None, prefix: str = "") -> list[str]:
    """All dotted keys of the schema."""
    tree = OmegaConf.to_container(OmegaConf.structured(Config)) if tree is None else tree
    keys = []
    for key, value in tree.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += known_keys(value, f"{prefix}{key}.")
    return keys


def nearest_key(name: str) -> str | None:
    """The schema's key whose last part is most like `name`, or None where none is."""
    if name in RENAMED:
        return RENAMED[name]
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in reversed(known_keys())}
    match = difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.5)
    return by_last_part[match[0]] if match else None
