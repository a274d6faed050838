"""What a run comes down to: the content of its `summary.json`."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """The outcome of one run, the same on every rank."""

    final: dict[str, float]
    """`test_error` (a fraction), `test_loss`, and `train_loss`, the mean over the last agreed steps."""
    steps: int
    """Optimiser steps done."""
    seconds: float
    """Wall time of the training loop and its evaluations over all attempts, without start-up and lost steps."""
    world_size: int
    config_hash: str

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values."""
        return asdict(self)
