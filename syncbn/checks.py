"""Range checks on a config: what a typed field still lets through.

Each check is a row (key, test, what is allowed), so that an error always names the key, its value and the
allowed range, and so that the whole set can be read at a glance.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from syncbn.config import ARMS, PROBES, Config, ParameterGroup, StudyConfig
from syncbn.errors import UsageError
from syncbn.registry import (
    CALLBACKS,
    DATA,
    MODELS,
    OPTIMIZERS,
    REGISTRIES,
    TASKS,
    TRANSFORMS,
    Registry,
)
from syncbn.study_checks import complaints


@dataclass(frozen=True)
class Check:
    """A test on the value of the dotted `key`, and the words for what passes it."""

    key: str
    passes: Callable[[Any], bool]
    allowed: object


def _one_of(key: str, *names: str) -> Check:
    return Check(key, lambda value: value in names, "one of " + ", ".join(names))


def _registered(registry: Registry) -> Check:
    """The name that a group chooses; the words for what is allowed are those of the names known when it is read."""
    return Check(f"{registry.group}.name", lambda name: name in registry.names(), _Names(registry))


class _Names:
    """The names of a registry in words."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __str__(self) -> str:
        return f"one of {', '.join(self._registry.names())}"


def _whole(key: str, least: int, most: int = 2**31 - 1) -> Check:
    def passes(value: int | None) -> bool:
        return value is None or least <= value <= most

    return Check(key, passes, f"a whole number >= {least} and <= {most}")


def _text(key: str) -> Check:
    return Check(
        key, lambda value: value is None or value.strip() != "", "a text that is not empty"
    )


SQLITE = "sqlite:///"
"""How the URI of a store in a file begins."""


def is_tracking_uri(uri: str) -> bool:
    """Whether `uri` is one that MLflow is reached by: of a server, or of an sqlite file."""
    if uri.startswith(SQLITE):
        return True
    try:
        parts = urlsplit(uri)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        return False


TRACKING_URIS = "http://host:port, https://host or sqlite:///file"
"""What `is_tracking_uri` lets through, in words."""


def _positive(key: str) -> Check:
    return Check(
        key,
        lambda value: value is None or (math.isfinite(value) and value > 0),
        "a finite number > 0",
    )


def _between(key: str, low: float, high: float) -> Check:
    return Check(
        key,
        lambda value: value is None or low <= value <= high,
        f"a number from {low:g} to {high:g}",
    )


def is_folder_name(text: str) -> bool:
    """Whether `text` is one plain folder name: letters, digits, `._-`, no leading dot, at most 100 long."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", text) is not None


def _is_group(group: ParameterGroup) -> bool:
    """Whether a parameter group's numbers are finite and not negative."""
    given = [x for x in (group.lr_scale, group.weight_decay) if x is not None]
    return all(math.isfinite(x) and x >= 0 for x in given)


CHECKS = (
    Check("name", is_folder_name, "one folder name of letters, digits, '.', '_' and '-'"),
    _whole("seed", 0, 2**32 - 1),
    _text("runs_dir"),
    _registered(MODELS),
    _one_of("model.activation", "relu", "sigmoid", "tanh", "silu"),
    _one_of("model.init", "default", "normal"),
    _one_of("model.placement", "pre", "post", "input"),
    _positive("model.init_std"),
    _whole("model.width", 1),
    Check("model.dropout", lambda share: 0 <= share < 1, "a number from 0 to below 1"),
    _one_of("model.weights_match", "all", "backbone", "any"),
    Check(
        "model.weights_sha256",
        lambda text: text is None or re.fullmatch("[0-9a-f]{64}", text) is not None,
        "64 hexadecimal digits",
    ),
    _text("model.arch"),
    _text("model.weights"),
    Check("model.hidden", lambda widths: all(w >= 1 for w in widths), "whole numbers >= 1"),
    _registered(DATA),
    _text("data.root"),
    _whole("data.limit", 1),
    Check("data.validation", lambda share: 0 <= share < 1, "a number from 0 to below 1"),
    _whole("data.image_size", 1),
    _whole("data.channels", 1),
    _whole("data.num_classes", 2),
    _whole("data.num_samples", 1),
    _whole("data.num_loaders", 0),
    _registered(TASKS),
    Check("task.label_smoothing", lambda share: 0 <= share < 1, "a number from 0 to below 1"),
    _whole("task.top", 1),
    _one_of("norm.name", *ARMS),
    _whole("norm.group_size", 1),
    _whole("norm.num_groups", 1),
    _whole("norm.ghost_size", 2),
    _between("norm.momentum", 0.0, 1.0),
    _positive("norm.eps"),
    _registered(OPTIMIZERS),
    _positive("optim.lr"),
    Check("optim.momentum", lambda share: 0 <= share < 1, "a number from 0 to below 1"),
    Check(
        "optim.weight_decay", lambda rate: math.isfinite(rate) and rate >= 0, "a finite number >= 0"
    ),
    _one_of("optim.schedule", "constant", "cosine", "step", "exponential"),
    _whole("optim.warmup_steps", 0),
    Check(
        "optim.milestones",
        lambda shares: all(0 < a < 1 for a in shares) and list(shares) == sorted(shares),
        "ascending numbers between 0 and 1",
    ),
    _positive("optim.gamma"),
    _whole("optim.decay_steps", 1),
    _one_of("optim.lr_scaling", "none", "linear", "sqrt"),
    _whole("optim.base_batch", 1),
    _positive("optim.clip_norm"),
    Check(
        "optim.groups",
        lambda groups: all(_is_group(group) for group in groups.values()),
        "lr_scale and weight_decay must be finite numbers >= 0",
    ),
    _whole("train.steps", 1),
    _whole("train.per_rank_batch", 1),
    _whole("train.accumulate", 1),
    _one_of("train.shares", "shuffled", "by_class"),
    _whole("train.eval_every", 0),
    _whole("train.eval_batch", 1),
    _whole("train.log_every", 1),
    _whole("train.agree_every", 1),
    _whole("train.checkpoint_every", 0),
    Check(
        "train.checkpoint_every_s",
        lambda seconds: seconds is None or (math.isfinite(seconds) and seconds >= 0),
        "a finite number >= 0, or none",
    ),
    _positive("train.time_limit_s"),
    _whole("train.patience", 1),
    _between("train.target_error", 0.0, 1.0),
    _one_of("train.precision", "float32", "float64", "bf16", "fp16"),
    _one_of("train.parallel", "ddp", "fsdp"),
    Check("train.ema", lambda decay: decay is None or 0 < decay < 1, "a number between 0 and 1"),
    _one_of("train.device", "auto", "cpu", "cuda"),
    _whole("train.num_threads", 1),
    _one_of("launcher.name", "local", "ray"),
    _whole("launcher.num_workers", 1),
    _text("launcher.address"),
    _whole("launcher.processes", 1),
    _whole("launcher.cpus_per_worker", 1),
    _whole("launcher.gpus_per_worker", 0),
    _positive("launcher.timeout_s"),
    _positive("launcher.start_timeout_s"),
    _whole("launcher.max_restarts", 0),
    Check(
        "probe.names",
        lambda names: set(names) <= set(PROBES),
        "a list of any of " + ", ".join(PROBES),
    ),
    _whole("probe.every", 0),
    _whole("probe.first", 0),
    _whole("probe.samples", 1),
    _one_of("tracking.name", "mlflow", "journal"),
    Check("tracking.uri", lambda uri: uri is None or is_tracking_uri(uri), TRACKING_URIS),
    _text("tracking.experiment"),
)


def _value(cfg: Config, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(cfg: Config) -> None:
    """Raise `UsageError` naming the first key of `cfg` whose value is not allowed."""
    for row in CHECKS:
        value = _value(cfg, row.key)
        if not row.passes(value):
            raise UsageError(f"{row.key}={value!r} is not allowed: {row.allowed}")
    for group, registry in REGISTRIES.items():
        chosen = getattr(cfg, group)
        entry = registry.find(chosen.name)
        if entry is not None:
            entry.keywords(chosen)
        elif chosen.options:
            raise UsageError(
                f"{group}.options is not allowed with {group}={chosen.name}, which has keys of its own"
            )
    for complaint in (*_of_names(cfg), *_across_keys(cfg)):
        raise UsageError(complaint)
    if cfg.study is not None:
        if cfg.tracking.log_model:
            raise UsageError(
                "tracking.log_model=True is not allowed in a study, whose trials log no model: train one of them again "
                "with `syncbn train` and a name of its own"
            )
        if cfg.train.time_limit_s is not None:
            raise UsageError(
                f"train.time_limit_s={cfg.train.time_limit_s:g} is not allowed in a study: its trials are compared "
                "after equal numbers of steps"
            )
        _check_study(cfg.study, cfg.task.name == "classification")


def _of_names(cfg: Config) -> Iterator[str]:
    """Complaints about names of transforms and callbacks; their options raise `UsageError` themselves."""
    yield from _chosen("data.transforms", cfg.data.transforms, TRANSFORMS)
    yield from _chosen("callbacks", cfg.callbacks, CALLBACKS)


def _chosen(key: str, names: dict[str, Any], registry: Registry) -> Iterator[str]:
    for name, given in names.items():
        entry, known = registry.find(name), registry.names()
        if entry is None:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known) or 'none'}"
            yield f"{key}.{name} is not a {registry.group} of an extension: {hint}"
        elif not isinstance(given, dict | None):
            yield f"{key}.{name}={given!r} is not allowed: its options by name, {{}} for none"
        else:
            entry.typed(given or {})


def _across_keys(cfg: Config) -> Iterator[str]:
    """Complaints about keys that are each fine alone."""
    if cfg.model.name in ("torchvision", "timm") and cfg.model.arch is None:
        name = cfg.model.name
        yield f"model={name} needs model.arch, the name of a {name} classification model"
    if cfg.model.weights_sha256 is not None and cfg.model.weights is None:
        yield "model.weights_sha256 is not allowed without model.weights, whose content it is of"
    yield from _no_part_of_the_model(cfg)
    yield from _of_training(cfg)
    if cfg.tracking.log_model:
        yield from _of_the_logged_model(cfg)
    if cfg.optim.nesterov and not cfg.optim.momentum:
        yield "optim.nesterov=True needs optim.momentum > 0"
    if cfg.norm.name == "sync_group":
        size, ranks = cfg.norm.group_size, cfg.launcher.num_workers
        if size is None or ranks % size:
            yield f"norm.group_size={size} must divide launcher.num_workers={ranks}"
    if cfg.model.name == "mlp" and _samples_together(cfg) == 1:
        yield (
            f"norm={cfg.norm.name} with train.per_rank_batch={cfg.train.per_rank_batch} and "
            f"launcher.num_workers={cfg.launcher.num_workers} normalises samples of model=mlp one by one, which leaves "
            "nothing of them: at least 2 samples must share their statistics"
        )
    if cfg.data.pin_memory and cfg.train.device == "cpu":
        yield "data.pin_memory=True is not allowed with train.device=cpu: it is of use to GPUs alone"
    if cfg.train.virtual and cfg.norm.name == "torch_sync":
        yield (
            "norm=torch_sync is not allowed with train.virtual=True: torch's layer needs real ranks; "
            "use norm=sync, or train.virtual=False"
        )
    if cfg.norm.name == "ghost" and cfg.train.per_rank_batch % cfg.norm.ghost_size:
        yield (
            f"norm.ghost_size={cfg.norm.ghost_size} must divide "
            f"train.per_rank_batch={cfg.train.per_rank_batch}"
        )


def _of_the_logged_model(cfg: Config) -> Iterator[str]:
    """Complaints about a run whose network is to be logged."""
    if cfg.tracking.name == "journal":
        yield "tracking.log_model=True is not allowed with tracking=journal: models go to MLflow; tracking=mlflow"
    name = cfg.tracking.registered_name
    if not name.strip(" .") or set(name) & set("/:"):
        key = "tracking.experiment" if cfg.tracking.model_name is None else "tracking.model_name"
        yield f"{key}={name!r} is not allowed as the name of a registered model: a text without / and :"


def _no_part_of_the_model(cfg: Config) -> Iterator[str]:
    """Complaints about options that the model named would leave aside without a word."""
    name = cfg.model.name
    if cfg.model.lrn and name not in ("cnn", "vgg"):
        yield f"model.lrn=True is not allowed with model.name={name}: one of cnn, vgg"
    if cfg.model.dropout and name not in ("mlp", "cnn", "vgg"):
        yield (
            f"model.dropout={cfg.model.dropout:g} is not allowed with model.name={name}, whose networks bring "
            "their own: one of mlp, cnn, vgg"
        )


_PROBES_OF_THE_STEP = ("gradients", "exchange")
"""Probes that read what a step leaves, and run no network themselves."""


def _of_training(cfg: Config) -> Iterator[str]:
    """Complaints about ways of training that exclude each other."""
    train = cfg.train
    if train.keep_best and not train.eval_every:
        yield "train.keep_best=True needs train.eval_every > 0: nothing else measures which is best"
    if train.accumulate > 1 and train.shares == "by_class":
        yield (
            f"train.accumulate={train.accumulate} is not allowed with train.shares=by_class, whose order is that of a "
            "whole step: 1"
        )
    if train.compile and train.checkpoint_activations:
        yield (
            "train.compile=True is not allowed with train.checkpoint_activations=True: the compiler decides itself "
            "what is computed again"
        )
    if train.parallel == "fsdp" and cfg.num_ranks > 1:
        yield from _of_shards(cfg)
    own = [name for name in cfg.probe.names if name not in _PROBES_OF_THE_STEP]
    for key, value, other in (
        ("accumulate", train.accumulate, train.accumulate > 1),
        ("precision", train.precision, train.precision in ("bf16", "fp16")),
    ):
        if own and other:
            yield (
                f"probe {own[0]} is not allowed with train.{key}={value}, since it runs the network on whole batches "
                f"in the parameters' precision: one of {', '.join(_PROBES_OF_THE_STEP)}"
            )


def _of_shards(cfg: Config) -> Iterator[str]:
    """Complaints about what cannot be done where each rank holds a part of the network."""
    if cfg.train.compile:
        yield (
            "train.compile=True is not allowed with train.parallel=fsdp, whose gathering of parameters would cut the "
            "compiled graph at every block: train.parallel=ddp, or train.compile=false"
        )
    for name in cfg.probe.names:
        if name != "exchange":
            yield (
                f"probe {name} is not allowed with train.parallel=fsdp, since it reads parameters of which rank 0 "
                "holds a part: exchange, or train.parallel=ddp"
            )


def _samples_together(cfg: Config) -> int | None:
    """How many samples share their statistics; None for arms that need no second one, or check it themselves."""
    ranks = {
        "local": 1,
        "local_avg": 1,
        "sync_group": cfg.norm.group_size,
        "sync": cfg.launcher.num_workers,
        "torch_sync": cfg.launcher.num_workers,
        "big_batch": cfg.launcher.num_workers,
    }.get(cfg.norm.name)
    return None if ranks is None else ranks * cfg.train.per_rank_batch


def _check_study(study: StudyConfig, classifies: bool) -> None:
    """Raise `UsageError` for the first thing that is wrong with a study."""
    for complaint in complaints(study, classifies):
        raise UsageError(complaint)
    for arm in study.arms:
        if not is_folder_name(arm):
            raise UsageError(f"study arm {arm!r} is not allowed: one plain folder name")
