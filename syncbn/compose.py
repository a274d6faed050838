"""From command-line overrides to a checked `Config`: the one place that talks to Hydra.

Hydra's compose API is used rather than `@hydra.main`, because every failure must leave as one line with exit
code 2, nothing may be written before the config is known to be good, and two ranks must not make two folders.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
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
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from syncbn.checks import SQLITE, check
from syncbn.config import Config, RunConfig
from syncbn.errors import UsageError
from syncbn.extensions import load_extensions
from syncbn.keys import instead_of, known_keys
from syncbn.overrides import (
    Grid,
    Point,
    explain_hydra,
    grid_of,
    parse,
    refuse_several,
    with_quoted_home,
)
from syncbn.registry import CALLBACKS, REGISTRIES, TRANSFORMS
from syncbn.weights import pin

ENV_ALLOWED = ("HOME", "USER", "TMPDIR", "SYNCBN_DATA_ROOT")
"""Environment variables that a config may read through `${oc.env:NAME}`."""

_NOISE = ("full_key:", "object_type=", "reference_type=")
"""Lines of OmegaConf's messages that mean nothing to a user."""
_OWN_NAMES = ("optim.groups", "data.transforms", "callbacks")
"""Keys under which users give names of their own."""

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
    refuse_several(overrides)
    _prepare(overrides)
    cfg = _checked(_tree(overrides))
    pin(cfg)
    return cfg


def compose_grid(overrides: Sequence[str]) -> tuple[Grid, Iterator[tuple[Point, Config]]]:
    """The grid that `overrides` make, and the config of each of its points in order, checked as it is asked for.

    Hydra composes once for each choice of groups, 0.1 s, and keys are set in a copy of that, as Hydra sets them.

    Raises:
        UsageError: as `compose` and `grid_of`; at a point, with the values that it has there.
    """
    refuse_unsafe(overrides)
    _prepare(overrides)
    grid = grid_of(overrides, _options_of)
    return grid, _configs(grid)


def _configs(grid: Grid) -> Iterator[tuple[Point, Config]]:
    trees: dict[tuple[str, ...], DictConfig] = {}
    for point in grid.points():
        chosen = tuple(f"{key}={value.text}" for key, value in point.items() if _is_group(key))
        try:
            if chosen not in trees:
                trees[chosen] = _tree([*grid.fixed, *chosen])
            cfg = _checked(_with_values(trees[chosen], point))
            pin(cfg)
            yield point, cfg
        except UsageError as error:
            said = " ".join(f"{key}={value.text}" for key, value in point.items())
            raise UsageError(f"trial {said}: {error}") from error


def _with_values(tree: DictConfig, point: Point) -> DictConfig:
    """A copy of `tree` with the dotted keys of `point` set."""
    tree = deepcopy(tree)
    for key, value in point.items():
        if _is_group(key):
            continue
        try:
            OmegaConf.update(tree, key, value.plain, force_add=key.startswith(_OWN_NAMES))
        except OmegaConfBaseException as error:
            raise UsageError(f"{key}={value.text} is not allowed: {_one_line(error)}") from error
    return tree


def _prepare(overrides: Sequence[str]) -> None:
    """Import what the job's extensions register, so that it can be composed."""
    load_extensions(named_extensions(overrides))
    _offer_registered()


def _tree(overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of `overrides`."""
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return hydra_compose("main", overrides=[*map(_as_hydra_takes, overrides)])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UsageError(_one_line(error)) from error


def _checked(tree: DictConfig) -> Config:
    """`tree` as a typed config, its values in their ranges."""
    _refuse_environment(tree)
    try:
        cfg = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from error
    assert isinstance(cfg, Config)
    _check(cfg)
    return cfg


def _is_group(key: str) -> bool:
    return any((folder / key).is_dir() for folder in config_folders()) or key in REGISTRIES


def _options_of(group: str) -> list[str]:
    """What can be chosen in a config group; nothing where there is no such group."""
    if not _is_group(group):
        return []
    registered = REGISTRIES[group].extensions() if group in REGISTRIES else []
    return list(dict.fromkeys([*config_files(group), *(entry.name for entry in registered)]))


def _check(cfg: Config) -> None:
    """`check` it, its paths without `~`.

    Every option of its transforms and callbacks is written down, so that the hash has it.
    """
    _expand_home(cfg)
    check(cfg)
    cfg.data.transforms = {
        name: TRANSFORMS[name].defaults | dict(given or {})
        for name, given in cfg.data.transforms.items()
    }
    cfg.callbacks = {
        name: CALLBACKS[name].defaults | dict(given or {}) for name, given in cfg.callbacks.items()
    }


def _expand_home(cfg: Config) -> None:
    """Put the home folder in place of `~` at the beginning of a path."""
    for part, key in ((cfg, "runs_dir"), (cfg.data, "root"), (cfg.model, "weights")):
        text = getattr(part, key)
        if text is not None:
            setattr(part, key, _at_home(text))
    uri = cfg.tracking.uri or ""
    if uri.startswith(SQLITE):
        cfg.tracking.uri = SQLITE + _at_home(uri.removeprefix(SQLITE))


def _at_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise UsageError(f"{path!r} is not allowed: it names no user's home folder") from error


def named_extensions(overrides: Sequence[str]) -> list[str]:
    """The extensions of a job: those of the last override that names them, else those of the project's config.

    Raises:
        UsageError: folders without our settings, or what is no list of names.
    """
    _refuse_unfounded()
    named = [
        value for key, _, value in (o.partition("=") for o in overrides) if key == "extensions"
    ]
    try:
        given = yaml.safe_load(named[-1]) if named else _own_extensions()
    except (yaml.YAMLError, OmegaConfBaseException):
        given = named[-1] if named else "?"
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


def _as_hydra_takes(override: str) -> str:
    """`override` with a quoted `~`, and as an addition where it adds names of the user's own to the schema."""
    override = with_quoted_home(override)
    return f"++{override}" if override.startswith(_OWN_NAMES) else override


def recorded_config(tree: Mapping[str, Any]) -> Config:
    """The config that a journal holds as `tree`, checked; keys that are younger than it have their defaults.

    Weights that the run began with may have gone or changed since; their sha256 stays as it is recorded.

    Raises:
        UsageError: a key or a value that is not known any more.
    """
    tree = deepcopy(dict(tree))
    if "dtype" in tree.get("train", {}):  # of a journal from before the key's present name
        tree["train"]["precision"] = tree["train"].pop("dtype")
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(Config), tree))  # pyright: ignore[reportArgumentType]
    except OmegaConfBaseException as error:
        raise UsageError(f"its config cannot be used: {_one_line(error)}") from error


def vary(cfg: Config, overrides: Sequence[str]) -> RunConfig:
    """The run of `cfg` with an arm's `overrides`: groups (`norm=local`) and dotted keys (`optim.lr=0.1`).

    A group's file is laid over what `cfg` has, so that settings it does not mention stay as the study has them.

    Raises:
        UsageError: as `compose`.
    """
    refuse_unsafe(overrides)
    # without the study, whose arms and claims are most of the tree: two thirds of the time
    tree = OmegaConf.structured(replace(cfg, study=None))
    try:
        for override in overrides:
            key, value = override.split("=", 1)
            if key.partition(".")[0] == "study":
                raise UsageError(f"{override} is not allowed: an arm changes a run, not its study")
            if _is_group(key):
                chosen = _group(key, value)
                if key in REGISTRIES and chosen.get("name") != tree[key].name:
                    tree[key].options = {}  # those of another function
                tree[key] = OmegaConf.merge(tree[key], chosen)
            else:
                if key == "model.weights":
                    tree.model.weights_sha256 = None  # that of another content
                tree.merge_with_dotlist([override])
        varied = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from error
    assert isinstance(varied, Config)
    varied.study = cfg.study
    _check(varied)
    if varied.model != cfg.model:
        pin(varied)
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
        raise UsageError(f"{group}={option} is not allowed: one of {', '.join(_options_of(group))}")
    tree = OmegaConf.load(files[option])
    assert isinstance(tree, DictConfig)
    return tree


def refuse_unsafe(overrides: Sequence[str]) -> None:
    """Raise `UsageError` for overrides that could reach beyond the schema, or have a form that is no setting's."""
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if override.startswith("-"):
            raise UsageError(f"unknown option {override!r}: settings are given as key=value")
        if not key or not (equals or override.startswith("~")):
            raise UsageError(f"{override!r} is not a setting: give key=value")
        if key.startswith("hydra"):
            raise UsageError(explain_hydra(override))
        if "_target_" in override:
            raise UsageError(f"{override!r} is not allowed: _target_ is refused")
        for complaint in _about_form(override, key, value):
            raise UsageError(complaint)


def _about_form(override: str, key: str, value: str) -> Iterator[str]:
    """Complaints about forms that Hydra knows and a typed config has no use for."""
    plain = key.partition("@")[0].replace("/", ".")
    known = plain in known_keys() or _is_group(plain) or ".options." in plain
    if plain != key:
        yield (
            f"{override!r} is not allowed: keys are written with dots, and each group has one place: "
            f"give {plain}={value}"
        )
    if _is_group(plain) and override.startswith(plain):
        yield from _about_option(override, plain)
    group, _, last = plain.rpartition(".")
    if last == "name" and _names_an_option(group, value):
        yield f"{override!r} is not allowed: {value} is an option of {group}, which sets more: give {group}={value}"
    if override.startswith("+") and not key.startswith("study.arms."):
        sign = override[: len(override) - len(override.lstrip("+"))]
        yield (
            f"{override!r} is not allowed: {key} is there already, and needs no {sign}: give {key}={value}"
            if known
            else f"unknown key {key!r}{instead_of(key)}"
        )
    if override.startswith("~") and known and not key.startswith("study."):
        yield f"{override!r} is not allowed: no key of a run can be left out: give it a value, {key}=VALUE"


def _about_option(override: str, group: str) -> Iterator[str]:
    """Complaints about what is no text where an option of `group` is chosen; several values are a sweep's."""
    given = parse(override)
    if not given.is_sweep_override() and (not isinstance(given.value(), str) or not given.value()):
        rest = ", or nothing at all" if group in ("study", "debug") else ""
        yield f"{override!r} is not allowed: one of {', '.join(_options_of(group))}{rest}"


def _names_an_option(group: str, value: str) -> bool:
    """Whether `value` is an option of `group` and no name by which it is registered, as resnet18 is of models."""
    registry = REGISTRIES.get(group)
    return registry is not None and value not in registry.names() and value in config_files(group)


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
    text = " ".join(line for line in lines if not line.startswith(_NOISE))
    text = re.sub(r"Error merging override \+*(.*?): (?=[A-Zf])", r"\1 is not allowed: ", text)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key or error.key} has no value and no default: give {error.full_key or error.key}=VALUE"
    group = re.search(r"Could not find '(\w+)/([^']*)'", text)
    if group:
        near = difflib.get_close_matches(group[2], _options_of(group[1]), n=1)
        return text.strip() + (f"; did you mean {near[0]!r}?" if near else "")
    option = re.search(r"Could not override '(\w+)\.options\.(\w+)'", text)
    if option:
        return f"{option[0][20:-1]} is no option of what {option[1]}= chooses{_options_like(*option.groups())}"
    if "data.transforms=" in text:
        return "data.transforms takes names, each with its options: data.transforms={jitter:{strength:0.2},blur:{}}"
    if "callbacks=" in text:
        return (
            "callbacks takes names, each with its options: callbacks={histogram:{every:10},bell:{}}"
        )
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' not in", text)
    if unknown is None:
        return text.strip()
    key = unknown.group(1) or unknown.group(2)
    return f"unknown key {key!r}{instead_of(key)}"


def _options_like(group: str, wrong: str) -> str:
    """The nearest option of what extensions have registered in `group`, or all of them."""
    known = [o for entry in REGISTRIES[group].extensions() for o in entry.defaults]
    near = difflib.get_close_matches(wrong, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f": one of {', '.join(known)}"
    return hint if known else ""
