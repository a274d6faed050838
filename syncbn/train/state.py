"""The state of a run: how it is built and restored. It is saved by `syncbn.train.saving`.

What is built depends on the config alone, never on which rank builds it; ranks differ only in their share of each
global batch and in their random state after the weights are drawn.
"""

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.arms import apply_arm
from syncbn.callbacks import Callbacks
from syncbn.checkpoint import (
    check_matches,
    load_latest,
    restore_model,
    restore_optimizer,
    rng,
)
from syncbn.config import RunConfig, config_hash
from syncbn.data import DataSets, load_data
from syncbn.data.chance import seed_generators
from syncbn.errors import UsageError
from syncbn.models import build_model
from syncbn.norm import SyncBatchNorm
from syncbn.optim import build_optimizer
from syncbn.probes import Probes, View
from syncbn.provenance import git_revision, sources, versions
from syncbn.runtime.base import Runtime
from syncbn.sampling import SampleStream, rank_share
from syncbn.structure import moved
from syncbn.tasks import Task, build_task, collate_of
from syncbn.tracking import Tracker, read_journal
from syncbn.tracking.redact import redact
from syncbn.train.accumulate import accumulated_share
from syncbn.train.changed_config import accept_changes
from syncbn.train.ema import Ema
from syncbn.train.network import trained
from syncbn.train.parallel import Alone, parallel
from syncbn.train.precision import LossScale, loss_scale
from syncbn.train.weights import Report, load_weights
from syncbn.weights import has_begun


@dataclass
class Standing:
    """What the loop has seen so far, saved with the run so that resuming changes no decision."""

    train_loss: float = math.nan
    """Mean training loss over the steps since an agreement or an evaluation was last due, at an end of a run."""
    losses: list[float] = field(default_factory=list)
    """The losses of these steps."""
    measured: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""
    measured_at: int = -1
    """The step of the last evaluation."""
    best_error: float = math.inf
    """The best value of the measure that the task decides by; negated where higher is better, as `kept_error` is."""
    evaluations_since_best: int = 0
    kept_error: float = math.inf
    """The lowest value of the measure that the task decides by, with `train.keep_best`."""
    kept_step: int = -1
    """The step at which it was measured, whose checkpoint is kept; -1 before any."""
    seconds: float = 0.0
    """Wall time of the loop and its evaluations, over all attempts."""
    probes: dict[str, Any] = field(default_factory=dict)
    """What the probes have summed up."""

    def final(self, task: Task) -> dict[str, float]:
        """What a run's summary says of it; the best is what `task` measured, whichever way is better."""
        best = self.kept_error if task.lower_is_better else -self.kept_error
        kept = {f"best_{task.decides}": best, "best_step": float(self.kept_step)}
        return (
            {"train_loss": self.train_loss} | self.measured | (kept if self.kept_step >= 0 else {})
        )


@dataclass
class State:
    """A run between two steps."""

    cfg: RunConfig
    runtime: Runtime
    sets: DataSets
    stream: SampleStream
    model: nn.Module
    """The network itself; `wrapped` is the same with gradients averaged over ranks."""
    wrapped: nn.Module
    parallel: Alone
    """How the network is spread over ranks."""
    optimizer: Optimizer
    task: Task
    probes: Probes
    ema: Ema | None = None
    """Averages of the parameters, with `train.ema`."""
    scale: LossScale | None = None
    """The scale of the loss, with fp16."""
    callbacks: Callbacks | None = None
    """Of extensions; None where the run has none."""
    weights: Report | None = None
    """What of `model.weights` fitted, where this rank has read them."""
    step: int = 0
    """Optimiser steps done."""
    standing: Standing = field(default_factory=Standing)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of parameters and inputs."""
        return getattr(torch, self.cfg.train.dtype_name)

    def batches(self) -> Iterator[tuple[int, Any, Any]]:
        """For each step to come: the size of its global batch, and this rank's share of inputs and targets."""
        sizes: deque[int] = deque()
        shares = self.sets.train.batches(self._shares(sizes), first_step=self.step)
        for x, y in shares:
            x = moved(x, self.runtime.device, self.dtype)
            yield sizes.popleft(), x, moved(y, self.runtime.device)

    def _shares(self, sizes: deque[int]) -> Iterator[Tensor]:
        """This rank's sample indices step by step; appends the global batch's size to `sizes` as it goes."""
        for step in range(self.step, self.cfg.train.steps):
            whole = self.stream.batch(step)
            sizes.append(len(whole))
            yield self._share(whole)

    def _share(self, whole: Tensor) -> Tensor:
        """This rank's part of a global batch."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        if self.cfg.train.accumulate == 1:
            return rank_share(whole, rank, world_size)
        return accumulated_share(whole, self.cfg.micro_batch, rank, world_size)


def build(cfg: RunConfig, runtime: Runtime) -> State:
    """A run at step 0.

    Raises:
        UsageError: another number of ranks than the config asks for, an unknown model, or a probe that cannot look.
        DataError: see `load_data`, or fewer samples than one global batch.
    """
    if runtime.world_size != cfg.num_ranks:
        raise UsageError(
            f"norm={cfg.norm.name} with launcher.num_workers={cfg.launcher.num_workers} trains on "
            f"{cfg.num_ranks} rank(s), but {runtime.world_size} were started"
        )
    task = build_task(cfg.task)
    _refuse_target(cfg, task)
    _refuse_pinning(cfg, runtime)
    sets = load_data(
        cfg.data, cfg.seed, pin_memory=runtime.device.type == "cuda", collate=collate_of(task)
    )
    labels = sets.train.labels if cfg.train.shares == "by_class" else None
    stream = SampleStream(len(sets.train), cfg.global_batch, cfg.seed, cfg.train.drop_last, labels)
    model = build_model(cfg.model, sets.shape, sets.num_classes, cfg.seed)
    model = apply_arm(model, cfg.norm, cfg.launcher.num_workers if cfg.train.virtual else None)
    if runtime.world_size == 1:
        _leave_alone(model)
    model.to(getattr(torch, cfg.train.dtype_name))  # before weights, which may have as many bits
    report = _given_weights(model, cfg, runtime)
    network = trained(model, cfg.train, runtime.device)
    spread = parallel(cfg.train.parallel, runtime)
    spread.place(model)
    _seed(cfg.seed * 1_000_003 + runtime.rank)  # dropout: another stream a rank
    optimizer = build_optimizer(model, cfg.optim)
    if cfg.norm.name == "sync_group":
        network = spread.in_step(network, sets.num_classes)
    probes = Probes(View(cfg, runtime, sets, stream, model))
    return State(
        cfg,
        runtime,
        sets,
        stream,
        model,
        spread.wrapped(network),
        spread,
        optimizer,
        task,
        probes,
        None if cfg.train.ema is None else Ema(model, cfg.train.ema),
        loss_scale(cfg.train.precision, runtime.device),
        Callbacks(cfg.callbacks, runtime, cfg.seed) if cfg.callbacks else None,
        report,
    )


def _refuse_target(cfg: RunConfig, task: Task) -> None:
    if cfg.train.target_error is not None and not task.lower_is_better:
        raise UsageError(
            f"train.target_error={cfg.train.target_error:g} is not allowed with task={cfg.task.name}, which decides by "
            f"{task.decides}, of which more is better: leave it out, or use train.patience"
        )


def _seed(seed: int) -> None:
    """Seed every generator whose state a checkpoint holds; forked ranks have a state of numpy's in common."""
    torch.manual_seed(seed)
    seed_generators(seed)


def _refuse_pinning(cfg: RunConfig, runtime: Runtime) -> None:
    if cfg.data.pin_memory and runtime.device.type != "cuda":
        raise UsageError(
            f"data.pin_memory=True is not allowed on a rank that computes on {runtime.device}: leave it out"
        )


def _given_weights(model: nn.Module, cfg: RunConfig, runtime: Runtime) -> Report | None:
    """Load `model.weights`, unless the run has a checkpoint of its own to continue from."""
    if cfg.model.weights is None:
        return None
    on_main = torch.tensor(float(has_begun(cfg)), device=runtime.device)
    return None if runtime.from_main(on_main) else load_weights(model, cfg, runtime)


def _leave_alone(model: nn.Module) -> None:
    """Let synchronised layers exchange nothing: other processes of a study's pool train other runs."""
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = 1


def resume(state: State, tracker: Tracker) -> None:
    """Continue from the run's latest whole checkpoint, where there is one; all ranks read it.

    Raises:
        CheckpointError: none of its checkpoints is whole, or it belongs to another config.
    """
    cfg, runtime = state.cfg, state.runtime
    checkpoint = load_latest(cfg.folder / "checkpoints") if cfg.train.resume else None
    if checkpoint is None:
        _begin(state, tracker)
        return
    meta = checkpoint.meta
    notes = [*checkpoint.notes]
    notes += accept_changes(cfg, cfg.folder, meta.config_hash, meta.step)
    notes += check_matches(checkpoint, runtime.world_size, cfg.global_batch, cfg.train.parallel)
    notes += restore_model(state.model, checkpoint.model_state)
    restore_optimizer(state.optimizer, checkpoint.optimizer_state)
    extra = dict(checkpoint.extra)
    apart = extra.pop("buffers", {})
    state.step, state.standing = meta.step, _restored(state, extra)
    state.probes.load_state_dict(state.standing.probes)
    if meta.world_size == runtime.world_size:
        _give_own_buffers(state.model, apart, runtime.rank)
        rng.restore(rng.from_text(meta.rng[runtime.rank]), runtime.device)
    notes += _changed_extensions(cfg) if runtime.is_main else []
    _begin(state, tracker)
    tracker.event("resume", step=meta.step, checkpoint=checkpoint.path.name, notes=notes)


@torch.no_grad()
def _give_own_buffers(model: nn.Module, apart: Mapping[str, Tensor], rank: int) -> None:
    """Give `model` what this rank had of buffers that were not the same on all, each (W, *shape) by name."""
    for name, buffer in model.named_buffers():
        if name in apart:
            buffer.copy_(apart[name][rank])


def _changed_extensions(cfg: RunConfig) -> list[str]:
    """What to tell the user where the source of an extension is not that of the attempt before; also on stderr."""
    path = cfg.folder / "journal.jsonl"
    records = list(read_journal(path)) if path.is_file() else []
    starts = [r for r in records if r.get("event") == "start"]
    before = starts[-1].get("extensions", {}) if starts else {}
    changed = [n for n, sha in sources(cfg.extensions).items() if before.get(n, sha) != sha]
    notes = [f"the source of extension {name} has changed since this run began" for name in changed]
    sys.stderr.write("".join(f"warning: {note}\n" for note in notes))
    return notes


def _restored(state: State, extra: dict[str, Any]) -> Standing:
    """The standing in a checkpoint's `extra`, whose other parts are given to what they are of."""
    rest = dict(extra)
    for name, part in parts(state).items():
        part.load_state_dict(rest.pop(name))
    return Standing(**rest)


def parts(state: State) -> dict[str, Ema | LossScale | Callbacks]:
    """What has a state of its own, by its name in a checkpoint; nothing by default."""
    parts = {"ema": state.ema, "loss_scale": state.scale, "callbacks": state.callbacks}
    return {name: part for name, part in parts.items() if part is not None}


def _begin(state: State, tracker: Tracker) -> None:
    tracker.begin(
        state.step,
        config=redact(asdict(state.cfg)),
        config_hash=config_hash(state.cfg),
        world_size=state.runtime.world_size,
        versions=versions(),
        git=git_revision(),
        extensions=sources(state.cfg.extensions),
        samples=state.stream.digest(),
    )
    if state.weights is not None:
        tracker.event("weights", **state.weights.to_dict())
    if state.cfg.train.accumulate > 1:
        tracker.event("note", text=_micro_batches(state.cfg))
    if state.cfg.train.parallel == "fsdp" and state.runtime.world_size == 1:
        tracker.event("note", text="train.parallel=fsdp: one process trains, and holds all itself")


def _micro_batches(cfg: RunConfig) -> str:
    return (
        f"train.accumulate={cfg.train.accumulate}: a step adds gradients up over micro-batches, and batch-norm "
        f"statistics are those of a micro-batch of {cfg.micro_batch} samples at most, not of all {cfg.global_batch}"
    )
