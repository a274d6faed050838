"""Agreement between ranks: every few steps one small all-reduce carries losses, and requests to stop and to save.

Whether the loop goes on must be decided alike on all ranks, or the next collective never ends. So a rank never acts on
its own loss, clock or signal, only on the sum over all ranks. The sum is started after a step and read a step later,
so that no host waits for its GPU.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.errors import NonFinite
from syncbn.runtime.base import Runtime


class Agreed(NamedTuple):
    """What all ranks know, each the same."""

    losses: dict[int, float]
    """The mean loss by step."""
    out_of_time: bool
    """Whether time is up on rank 0."""
    save_due: bool
    """Whether a save is due by rank 0's clock."""
    signal_number: int
    """The signal that asked one of them to stop, or 0."""


@dataclass
class Agreement:
    """This rank's part of what has happened since the ranks last agreed.

    A rank's share of a step's loss is its summed loss over what the global batch counts for, so that shares add up to
    the mean.
    """

    runtime: Runtime
    _parts: list[tuple[int, Tensor, int]] = field(default_factory=list)
    _steps: list[int] = field(default_factory=list)
    _sum: Callable[[], Tensor] | None = None

    def add(self, step: int, loss: Tensor, whole: int | Tensor) -> None:
        """Record this rank's summed loss `()` of `step`, whose global batch counts for `whole`, unread."""
        if isinstance(whole, Tensor):
            loss, whole = loss / whole, 1
        self._parts.append((step, loss, whole))

    @property
    def started(self) -> bool:
        """Whether there is something to `finish`."""
        return self._sum is not None

    def start(self, signal_number: int, out_of_time: bool, save_due: bool) -> None:
        """Start the one sum: losses, a count of each signal, rank 0's clock, and a flag a rank; a collective."""
        runtime, shares = self.runtime, self._shares()
        self._steps = [step for step, _, _ in self._parts]
        self._parts.clear()
        bad = [0.0] * runtime.world_size
        bad[runtime.rank] = float(not all(map(math.isfinite, shares)))
        clock = [float(flag and runtime.is_main) for flag in (out_of_time, save_due)]
        values = [*shares, *_votes(signal_number), *clock, *bad]  # numbers: few tensor operations
        self._sum = runtime.start_sum(_on(runtime, values))

    def _shares(self) -> list[float]:
        if not self._parts:
            return []
        losses = torch.stack([loss for _, loss, _ in self._parts]).tolist()
        return [loss / whole for loss, (_, _, whole) in zip(losses, self._parts, strict=True)]

    def finish(self) -> Agreed:
        """What ranks agreed on; waits for the sum.

        Raises:
            NonFinite: a loss is NaN or infinite; names the step and the ranks.
        """
        if self._sum is None:
            raise RuntimeError("no agreement was started")
        total, steps = self._sum().tolist(), self._steps
        self._sum = None
        losses = dict(zip(steps, total, strict=False))
        interrupted, terminated, late, save_due, *bad = total[len(steps) :]
        if any(bad):
            ranks = ", ".join(str(rank) for rank, flag in enumerate(bad) if flag)
            step = next(step for step, loss in losses.items() if not math.isfinite(loss))
            raise NonFinite(
                f"the loss of step {step} is not finite on rank {ranks}: lower optim.lr, or set optim.clip_norm"
            )
        return Agreed(losses, bool(late), bool(save_due), _outcome(interrupted, terminated))


def agreed_signal(signal_number: int, runtime: Runtime) -> int:
    """The signal that asked any rank to stop, the same on every rank, or 0; a collective."""
    return _outcome(*runtime.sum(_on(runtime, _votes(signal_number))).tolist())


def _votes(signal_number: int) -> list[float]:
    """One rank's share of how many were asked by SIGINT, and how many by SIGTERM."""
    return [float(signal_number == asked) for asked in (signal.SIGINT, signal.SIGTERM)]


def _on(runtime: Runtime, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=runtime.device)


def _outcome(interrupted: float, terminated: float) -> int:
    return int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)
