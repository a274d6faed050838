"""Agreement between ranks: every few steps one small all-reduce carries losses, and requests to stop.

Whether the loop goes on must be decided alike on all ranks, or the next collective never ends. So a rank never acts on
its own loss, clock or signal, only on the sum over all ranks.
"""

import math
import signal
from dataclasses import dataclass, field

import torch

from syncbn.errors import NonFinite
from syncbn.runtime.base import Runtime


@dataclass
class Agreement:
    """This rank's share of what has happened since the ranks last agreed.

    A rank's share of a step's loss is its summed loss over the global batch, so that shares add up to the mean.
    """

    runtime: Runtime
    _shares: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def add(self, step: int, share: torch.Tensor) -> None:
        """Record this rank's share `()` of the loss of `step`, without looking at it."""
        self._shares.append((step, share.detach()))

    def settle(self, signal_number: int, out_of_time: bool) -> tuple[dict[int, float], bool, int]:
        """Sum over ranks: mean loss by step since last time, whether time is up on rank 0, and a signal or 0.

        Raises:
            NonFinite: a loss is NaN or infinite; names the step and the ranks.
        """
        steps = [step for step, _ in self._shares]
        own = torch.stack([s for _, s in self._shares]) if steps else torch.empty(0)
        losses, asked, late, bad = self._exchange(own.double().cpu(), signal_number, out_of_time)
        self._shares.clear()
        if any(bad):
            ranks = ", ".join(str(rank) for rank, flag in enumerate(bad) if flag)
            step = next(
                (s for s, loss in zip(steps, losses, strict=True) if not math.isfinite(loss))
            )
            raise NonFinite(
                f"the loss of step {step} is not finite on rank {ranks}: lower optim.lr, or set optim.clip_norm"
            )
        return dict(zip(steps, losses, strict=True)), late, asked

    def _exchange(
        self, own: torch.Tensor, signal_number: int, out_of_time: bool
    ) -> tuple[list[float], int, bool, list[bool]]:
        """The one sum: losses, then a count of each signal, rank 0's clock, and a flag a rank."""
        size, rank = self.runtime.world_size, self.runtime.rank
        flags = torch.zeros(1 + size, dtype=torch.float64)
        flags[0] = out_of_time and self.runtime.is_main
        flags[1 + rank] = not bool(torch.isfinite(own).all())
        parts = torch.cat([own, _votes(signal_number), flags])
        total = self.runtime.sum(parts.to(self.runtime.device)).tolist()
        interrupted, terminated, late, *bad = total[len(own) :]
        asked = _outcome(interrupted, terminated)
        return total[: len(own)], asked, bool(late), [bool(flag) for flag in bad]


def agreed_signal(signal_number: int, runtime: Runtime) -> int:
    """The signal that asked any rank to stop, the same on every rank, or 0; a collective."""
    return _outcome(*runtime.sum(_votes(signal_number).to(runtime.device)).tolist())


def _votes(signal_number: int) -> torch.Tensor:
    """One rank's share `(2,)` of how many were asked by SIGINT, and how many by SIGTERM."""
    asked_by = [signal_number == signal.SIGINT, signal_number == signal.SIGTERM]
    return torch.tensor(asked_by, dtype=torch.float64)


def _outcome(interrupted: float, terminated: float) -> int:
    return int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)
