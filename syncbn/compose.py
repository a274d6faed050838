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
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.checks import check
from syncbn.config import Config, RunConfig
from syncbn.errors import UsageError
from syncbn.extensions import load_extensions
from syncbn.registry import REGISTRIES

ENV_ALLOWED = ("HOME", "USER", "TMPDIR", "SYNCBN_DATA_ROOT")
"""Environment variables that a config may read through `${oc.env:NAME}`."""

RENAMED = {"dtype": "train.precision"}
"""Keys that have another name now, by their last part."""

ConfigStore.instance().store("schema", node=Config)


def config_folder() -> Path:
    """Our folder of config groups: `SYNCBN_CONF` where it is set, else a checkout's `conf/`, else the installed one."""
    if "SYNCBN_CONF" in os.environ:
        return Path(os.environ["SYNCBN_CONF"]).resolve()
    package = Path(__file__).resolve().parent
    checkout = package.with_name("conf")
    return checkout if (checkout / "main.yaml").is_file() else package / "conf"


def config_folders() -> list[Path]:
    """Where configs are looked for: `conf/` of the project in the current folder, where there is one, then ours.

    A folder with a main.yaml is no project's but that of a checkout, which stands alone.
    """
    project = Path.cwd() / "conf"
    is_project = project.is_dir() and not (project / "main.yaml").exists()
    return [*([project] if is_project else []), config_folder()]


def config_files(group: str = "") -> dict[str, Path]:
    """The files of a config group by option, a project's in place of ours of that name; "" is the top level."""
    files: dict[str, Path] = {}
    for folder in reversed(config_folders()):
        files |= {path.stem: path for path in (folder / group).glob("*.yaml")}
    return dict(sorted(files.items()))


class _ProjectFirst(SearchPathPlugin):
    """Has Hydra look into a project's `conf/` before ours.

    `hydra.searchpath` would not do: it is appended, so ours would win, and the primary config is read before it.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(config_folders()[:-1]):
            search_path.prepend("project", f"file://{folder}", anchor="main")


Plugins.instance().register(_ProjectFirst)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `overrides` (Hydra's `key=value` grammar) make of `conf/main.yaml`, checked.

    Raises:
        UsageError: an unknown key (with the nearest known one), a value of the wrong type or range, an
            unknown group option (with the known ones), broken YAML, `_target_`, `hydra.*`, or an
            environment variable outside `ENV_ALLOWED`.
    """
    refuse_unsafe(overrides)
    _refuse_unfounded()
    load_extensions(_named_extensions(overrides))
    _offer_registered()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            tree = hydra_compose("main", overrides=[*map(_with_new_names, overrides)])
        _refuse_environment(tree)
        cfg = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(_one_line(error)) from error
    assert isinstance(cfg, Config)
    check(cfg)
    return cfg


def _named_extensions(overrides: Sequence[str]) -> list[str]:
    """The extensions of a job: those of the last override that names them, else those of the project's config."""
    named = [
        value for key, _, value in (o.partition("=") for o in overrides) if key == "extensions"
    ]
    try:
        given = yaml.safe_load(named[-1]) if named else _own_extensions()
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(_one_line(error)) from error
    given = [] if given is None else given
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise UsageError(f"extensions={given!r} is not allowed: a list of module names, as [mine]")
    return given


def _own_extensions() -> Any:
    return yaml.safe_load(config_files()["config"].read_text()).get("extensions")


def _offer_registered() -> None:
    """Let every registered name be chosen in its group without a file of its own."""
    for group, registry in REGISTRIES.items():
        for entry in registry.extensions():
            node = {"name": entry.name, "options": entry.defaults}
            ConfigStore.instance().store(group=group, name=entry.name, node=node)


def _refuse_unfounded() -> None:
    """Raise `UsageError` where the folders hold no config.yaml that starts from the schema."""
    if not (config_folder() / "main.yaml").is_file():
        raise UsageError(
            f"no main.yaml in {config_folder()}: set SYNCBN_CONF to a copy of syncbn's conf/, or unset it"
        )
    path = config_files()["config"]
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or "base" not in (tree.get("defaults") or ()):
        raise UsageError(
            f"{path} does not start from syncbn's own settings: begin it with `defaults: [base, _self_]`"
        )


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
            if any((folder / key).is_dir() for folder in config_folders()):
                chosen = _group(key, value)
                if key in REGISTRIES and chosen.get("name") != tree[key].name:
                    tree[key].options = {}  # those of another function
                tree[key] = OmegaConf.merge(tree[key], chosen)
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
    files = config_files(group)
    registered = REGISTRIES[group].extensions() if group in REGISTRIES else []
    entry = next((entry for entry in registered if entry.name == option), None)
    if entry is not None and option not in files:
        return OmegaConf.create({"name": entry.name, "options": entry.defaults})
    if option not in files:
        options = ", ".join([*files, *(entry.name for entry in registered)])
        raise UsageError(f"{group}={option} is not allowed: one of {options}")
    tree = OmegaConf.load(files[option])
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
    option = re.search(r"Could not override '(\w+)\.options\.(\w+)'", text)
    if option:
        return f"{option[0][20:-1]} is no option of what {option[1]}= chooses{_options_like(*option.groups())}"
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)'", text)
    return text.strip() + (_did_you_mean(unknown.group(1) or unknown.group(2)) if unknown else "")


def _options_like(group: str, wrong: str) -> str:
    """The nearest option of what extensions have registered in `group`, or all of them."""
    known = [o for entry in REGISTRIES[group].extensions() for o in entry.defaults]
    near = difflib.get_close_matches(wrong, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f": one of {', '.join(known)}"
    return hint if known else ""


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
