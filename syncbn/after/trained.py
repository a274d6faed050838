"""A run's network as it was evaluated: the weights of one of its checkpoints, in the run's arm or in plain torch."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.after.find import Found
from syncbn.arms import apply_arm
from syncbn.checkpoint import Checkpoint, load, load_best, load_latest, restore_model
from syncbn.config import RunConfig
from syncbn.data import DataSets, load_data
from syncbn.errors import CheckpointError, UsageError
from syncbn.kept_checkpoint import kept_checkpoint
from syncbn.models import build_model
from syncbn.norm import SyncBatchNorm
from syncbn.runtime.local import pick_device
from syncbn.tasks import Task, build_task, collate_of
from syncbn.train.changed_config import accept_changes
from syncbn.train.precision import autocast

LATEST, BEST = "latest", "best"
_PLAIN = ("none", "group_norm")
"""Arms that are torch's own modules already, and not its batch norm."""


@dataclass(frozen=True)
class Trained:
    """A run that can be measured, in evaluation mode.

    Attributes:
        found: the run.
        cfg: its config, with what was overridden.
        checkpoint: where its weights are from.
        sets: the data that `cfg` names.
        task: the task that `cfg` names.
        model: the network in the run's arm, on `device`.
        device: where it runs.
    """

    found: Found
    cfg: RunConfig
    checkpoint: Checkpoint
    sets: DataSets
    task: Task
    model: nn.Module
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of parameters and inputs."""
        return getattr(torch, self.cfg.train.dtype_name)

    def autocast(self) -> AbstractContextManager[Any]:
        """What the run's evaluations run in."""
        return autocast(self.cfg.train.precision, self.device)

    def plain(self) -> nn.Module:
        """The same network of torch's own norms alone, on the CPU."""
        arm = self.cfg.norm.name if self.cfg.norm.name in _PLAIN else "local"
        cfg = replace(self.cfg, norm=replace(self.cfg.norm, name=arm))
        return _built(cfg, self.sets, self.checkpoint, virtual=False)


def open_run(found: Found, which: str | None = None, cfg: RunConfig | None = None) -> Trained:
    """The network of `found` with the weights of a checkpoint, averaged ones where the run evaluates with them.

    Args:
        found: the run.
        which: see `chosen`.
        cfg: in place of the run's own config; the weights must fit what it describes.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
        DataError: see `load_data`.
        UsageError: the weights do not fit `cfg`, or there is no such device.
    """
    checkpoint = chosen(found, which)
    own = cfg is None
    cfg = found.config if cfg is None else cfg
    torch.set_num_threads(cfg.train.num_threads)
    device = pick_device(cfg.train.device, 0)
    task = build_task(cfg.task)
    sets = load_data(cfg.data, cfg.seed, collate=collate_of(task))
    try:
        model = _built(cfg, sets, checkpoint, cfg.train.virtual).to(device)
    except CheckpointError as error:
        if own:
            raise
        raise UsageError(
            f"the model of {found.folder} does not fit inputs {sets.shape} and {sets.num_classes} outputs: {error}"
        ) from error
    return Trained(found, cfg, checkpoint, sets, task, model, device)


def chosen(found: Found, which: str | None) -> Checkpoint:
    """The checkpoint `latest` (the newest whole one), `best` (see `train.keep_best`) or of a step.

    None takes the one that stands for the run: see `kept_checkpoint`.

    Raises:
        UsageError: another word.
        CheckpointError: there is none, it is damaged, or it is of another run.
    """
    folder = found.folder / "checkpoints"
    kept = kept_checkpoint(found.folder) if which is None else None
    if kept is not None:
        checkpoint = load(kept.path)
    elif which is None or which == LATEST:  # which says what is damaged, where something is
        checkpoint = load_latest(folder)
    elif which == BEST:
        checkpoint = load_best(folder)
    elif which.isdecimal():
        path = folder / f"step-{int(which):06d}"
        checkpoint = load(path) if path.is_dir() else None
    else:
        raise UsageError(f"--checkpoint {which} is not allowed: latest, best or a step")
    if checkpoint is None:
        raise CheckpointError(_missing(found, which))
    accept_changes(found.config, found.folder, checkpoint.meta.config_hash, checkpoint.meta.step)
    return checkpoint


def _missing(found: Found, which: str | None) -> str:
    steps = sorted(path.name for path in (found.folder / "checkpoints").glob("step-*"))
    if not steps:
        return f"run {found.folder} has saved no checkpoint yet: let it train on, with the same command"
    if which == BEST:
        return f"run {found.folder} keeps no best checkpoint: train it with train.keep_best=true"
    return f"run {found.folder} has no checkpoint of step {which}: there are {', '.join(steps)}"


def _built(cfg: RunConfig, sets: DataSets, checkpoint: Checkpoint, virtual: bool) -> nn.Module:
    """The network of `cfg` with the weights of `checkpoint`, on the CPU, in evaluation mode."""
    model = build_model(cfg.model, sets.shape, sets.num_classes, cfg.seed)
    model = apply_arm(model, cfg.norm, cfg.launcher.num_workers if virtual else None)
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = 1  # one process, whatever trained it
    model.to(getattr(torch, cfg.train.dtype_name))
    restore_model(model, _weights(checkpoint))
    if cfg.train.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model.eval()


def _weights(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """What the run is evaluated with: averages take the place of the parameters that they are of."""
    return checkpoint.model_state | checkpoint.extra.get("ema", {})
