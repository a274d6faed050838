"""What of a config decides a run's numbers, and its hash.

Names, places, services and timeouts are left out, so equal hashes promise equal runs wherever they ran. So are keys
that came after the first runs (`_LATER`) where they have their default, so that a run keeps its hash.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from syncbn.config.run import RunConfig, TaskConfig

_NOT_IN_HASH = {"name", "runs_dir", "tracking", "study", "extensions"}
_NOT_IN_HASH_OF = {
    "model": {"download"},
    "data": {"root", "download", "num_loaders", "pin_memory"},
    "train": {
        "resume",
        "progress",
        "checkpoint_every",
        "checkpoint_every_s",
        "keep_best",
        "time_limit_s",
    },
    "launcher": {
        "name",
        "address",
        "cpus_per_worker",
        "processes",
        "timeout_s",
        "start_timeout_s",
        "max_restarts",
    },
}
_LATER: dict[str, dict[str, Any]] = {
    "model": {"options": {}, "weights": None, "weights_match": "all", "weights_sha256": None},
    "data": {"options": {}, "transforms": {}},
    "task": asdict(TaskConfig()),
    "optim": {"groups": {}, "options": {}},
    "train": {
        "accumulate": 1,
        "channels_last": False,
        "compile": False,
        "checkpoint_activations": False,
        "ema": None,
        "parallel": "ddp",
    },
}
"""Keys by group with the value at which they are left out."""


def identity(cfg: RunConfig) -> dict[str, Any]:
    """The part of `cfg` that decides a run's numbers: without names, places, services and timeouts."""
    return identity_of(asdict(cfg))


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` of a config that was read back as a tree, as a journal's `start` record holds it."""
    tree = {key: value for key, value in config.items() if key not in _NOT_IN_HASH}
    for group, left_out in _NOT_IN_HASH_OF.items():
        tree[group] = {key: value for key, value in tree[group].items() if key not in left_out}
    for group, defaults in _LATER.items():
        tree[group] = {
            key: value
            for key, value in tree.get(group, {}).items()
            if key not in defaults or value != defaults[key]
        }
    if "transforms" in tree["data"]:  # their order counts
        tree["data"]["transforms"] = list(tree["data"]["transforms"].items())
    if callbacks := tree.pop("callbacks", {}):  # their order counts
        tree["callbacks"] = list(callbacks.items())
    if not tree["task"]:
        del tree["task"]
    if "weights_sha256" in tree["model"]:
        tree["model"].pop("weights", None)  # the content decides, wherever it lies
    if "dtype" in tree["train"]:  # of a journal from before the key's present name
        tree["train"]["precision"] = tree["train"].pop("dtype")
    return tree


def config_hash(cfg: RunConfig) -> str:
    """First 12 hex digits of the sha256 of `identity(cfg)`; equal hashes promise equal runs."""
    return _digest(identity(cfg))


def resume_hash(cfg: RunConfig) -> str:
    """`config_hash` without how the work is spread over ranks, which changes how sums round and nothing else.

    That is `train.parallel`, the world size and the batch a rank, which may change where their product does not.

    Virtual ranks are not processes but part of the arithmetic: their number may not change.
    """
    return _digest(resume_identity_of(asdict(cfg)))


def resume_hash_of(config: Mapping[str, Any]) -> str:
    """`resume_hash` of a config that was read back as a tree, as a journal's `start` record holds it."""
    return _digest(resume_identity_of(config))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two identities differ, with the value of each; None where one lacks the key."""
    left, right = flat(one), flat(other)
    keys = sorted(left.keys() | right.keys())
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of `tree` under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        leaves |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return leaves


def resume_identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `resume_hash` holds of a config that was read back as a tree."""
    tree = identity_of(config)
    tree["train"].pop("parallel", None)
    if not config["train"].get("virtual"):
        del tree["launcher"]["num_workers"], tree["train"]["per_rank_batch"]
    return tree


def _digest(tree: dict[str, Any]) -> str:
    train = dict(tree["train"])
    train["dtype"] = train.pop("precision")  # hashes are older than this name
    tree = {**tree, "train": train}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
