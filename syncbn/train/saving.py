"""Saves of a run: a copy of the state between two steps, which a thread of rank 0 writes while training goes on.

Decisions: all that a checkpoint holds is copied before the next step changes it, and copying changes nothing of the
run, so that its numbers do not depend on when it is saved. One write is under way at a time; a save that must be made
waits for it. What a write failed of is raised by the step after it, unless a later save has succeeded. How often a run
is saved that says nothing of it follows from what a save costs: the copy, and the thread's time on a processor.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.checkpoint import Background, HostCopy, Meta, rng, save
from syncbn.config import TrainConfig, resume_hash
from syncbn.runtime.base import Runtime
from syncbn.sharded import whole
from syncbn.tracking import Tracker
from syncbn.train.evaluation import settled_buffers
from syncbn.train.state import State, parts

SHARE = 0.01
"""Of a run's time that saves by the clock may take."""
SOONEST_S, LATEST_S = 5.0, 300.0
"""Bounds of the time between two of them; the second is what a fault may lose, whatever a save costs."""


def seconds_between(train: TrainConfig, cost_s: float) -> float:
    """Seconds from one save to the next by the clock, where a save costs `cost_s`; infinite where it makes none."""
    if train.checkpoint_every_s is not None:
        return train.checkpoint_every_s or math.inf
    if train.checkpoint_every > 0:
        return math.inf
    return min(max(cost_s / SHARE, SOONEST_S), LATEST_S)


class Saving:
    """Saves `state`; every rank has one, rank 0 writes and reports each save to `tracker`."""

    def __init__(self, state: State, tracker: Tracker) -> None:
        self._state, self._tracker = state, tracker
        self._memory = HostCopy()
        self._write: Background[tuple[Path, float]] = Background()
        self._step = 0
        """Of the write under way, or the last."""
        self._copied_at = time.monotonic()
        self.copy_s = 0.0
        """Seconds that training waited for the last copy."""
        self.cost_s = 0.0
        """Seconds that the last save took of the run: `copy_s`, and what its thread spent on a processor."""

    def is_due(self) -> bool:
        """Whether this rank's clock says that the run should be saved; not while a write is under way."""
        every_s = seconds_between(self._state.cfg.train, self.cost_s)
        return not self._write.running and time.monotonic() - self._copied_at >= every_s

    def start(self) -> None:
        """Copy the run as it stands and begin to write it; a collective that waits for the write before.

        Raises:
            RanksDisagree: synchronised running statistics differ between ranks.
        """
        self.close()
        began = time.monotonic()
        write = self._copied()
        self._copied_at = time.monotonic()
        self.copy_s = self._copied_at - began
        if write is not None:
            self._step = self._state.step
            self._write.start(partial(_timed, write))

    def check(self) -> None:
        """Report the write that has ended since the last time, if one has.

        Raises:
            CheckpointError: it could not be written.
        """
        if not self._write.running:
            self.wait()

    def wait(self) -> None:
        """Return when no write is under way; as `check`."""
        written = self._write.wait()
        if written is not None:
            path, seconds = written
            self.cost_s = self.copy_s + seconds
            self._tracker.event("checkpoint", step=self._step, folder=path.name)

    def finish(self) -> None:
        """Save the run as it stands; a collective that returns when it is written.

        Raises:
            CheckpointError: it could not be written.
            RanksDisagree: see `start`.
        """
        self.start()
        self.wait()
        self._state.runtime.barrier()

    def close(self) -> None:
        """Return when no write is under way, whatever became of it."""
        with suppress(Exception):
            self.wait()

    def _copied(self) -> Callable[[], Path] | None:
        """What writes a copy of the run as it stands; None on ranks that do not."""
        state, runtime = self._state, self._state.runtime
        self._memory.rewind()
        keep = self._memory.copy if runtime.is_main else None
        states = _random_states(runtime)
        model, optimizer, extra = (whole(one, keep) for one in _states(state))
        if not runtime.is_main:
            return None
        meta = Meta(
            step=state.step,
            position=state.step * state.cfg.global_batch,
            config_hash=resume_hash(state.cfg),
            world_size=runtime.world_size,
            global_batch=state.cfg.global_batch,
            parallel=state.cfg.train.parallel,
            rng=[rng.to_text(row) for row in states],
        )
        folder = state.cfg.folder / "checkpoints"
        return partial(save, folder, model, optimizer, meta, extra=extra, best=_best(state))


def _timed(write: Callable[[], Path]) -> tuple[Path, float]:
    """What `write` returns, and the seconds that its thread spent on a processor."""
    began = time.thread_time()
    return write(), time.thread_time() - began


def _states(state: State) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the model, the optimiser and all else hold, the same however the network is spread; a collective."""
    arm, runtime = state.cfg.norm.name, state.runtime
    model = dict(state.model.state_dict())
    settled = settled_buffers(state.model, arm, runtime)
    model |= {name: value for name, value in settled.items() if name in model}
    if runtime.is_main:
        state.standing.probes = state.probes.state_dict()
    extra = asdict(state.standing)
    extra |= {name: part.state_dict() for name, part in parts(state).items()}
    if apart := {} if arm == "sync" else _apart(state.model, runtime):
        extra["buffers"] = apart
    return model, state.optimizer.state_dict(), extra


def _apart(model: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """The buffers that are not the same on all ranks: those of each, (W, *shape) by name; a collective."""
    if runtime.world_size == 1:
        return {}
    buffers, apart = dict(model.named_buffers()), {}
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers.values()):
        own = {name: buffer for name, buffer in buffers.items() if buffer.dtype == dtype}
        rows = torch.stack(runtime.gather(torch.cat([one.flatten() for one in own.values()])))
        columns = rows.split([one.numel() for one in own.values()], dim=1)
        for (name, one), values in zip(own.items(), columns, strict=True):
            if bool((values != values[0]).any()):
                apart[name] = values.reshape(-1, *one.shape)
    return apart


def _best(state: State) -> int | None:
    """The step whose checkpoint is kept for its test error, if any is."""
    return state.standing.kept_step if state.standing.kept_step >= 0 else None


def _random_states(runtime: Runtime) -> Tensor:
    """The random state of every rank, (W, n) uint8."""
    own = rng.capture(runtime.device)
    rows = torch.zeros(runtime.world_size, len(own), dtype=torch.uint8, device=runtime.device)
    rows[runtime.rank] = own
    return runtime.sum(rows).cpu()
