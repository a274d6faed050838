"""What of a config decides a run's numbers, and its hash.

Names, places, services and timeouts are left out, so equal hashes promise equal runs wherever they ran.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from syncbn.config.run import RunConfig, TaskConfig

_NOT_IN_HASH = {"name", "runs_dir", "tracking", "study", "extensions"}
_NOT_IN_HASH_OF = {
    "data": {"root", "download", "num_loaders"},
    "train": {"resume", "progress", "checkpoint_every", "time_limit_s"},
    "launcher": {
        "name",
        "address",
        "cpus_per_worker",
        "processes",
        "timeout_s",
        "start_timeout_s",
    },
}


def identity(cfg: RunConfig) -> dict[str, Any]:
    """The part of `cfg` that decides a run's numbers: without names, places, services and timeouts."""
    return identity_of(asdict(cfg))


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` of a config that was read back as a tree, as a journal's `start` record holds it."""
    tree = {key: value for key, value in config.items() if key not in _NOT_IN_HASH}
    for group, left_out in _NOT_IN_HASH_OF.items():
        tree[group] = {key: value for key, value in tree[group].items() if key not in left_out}
    return _without_defaults(tree)


def _without_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` without keys that came later than the first hashes and say nothing: those runs keep their hash."""
    if tree.get("task") == asdict(TaskConfig()):
        tree = {key: value for key, value in tree.items() if key != "task"}
    return {
        group: {k: v for k, v in value.items() if k != "options" or v}
        if isinstance(value, Mapping)
        else value
        for group, value in tree.items()
    }


def config_hash(cfg: RunConfig) -> str:
    """First 12 hex digits of the sha256 of `identity(cfg)`; equal hashes promise equal runs."""
    return _digest(identity(cfg))


def resume_hash(cfg: RunConfig) -> str:
    """`config_hash` without the world size and the batch a rank, which may change where their product does not.

    Virtual ranks are not processes but part of the arithmetic: their number may not change.
    """
    tree = identity(cfg)
    if not cfg.train.virtual:
        del tree["launcher"]["num_workers"], tree["train"]["per_rank_batch"]
    return _digest(tree)


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
