"""The summary of a run: the content of its `summary.json`."""

from dataclasses import asdict, dataclass
from typing import Any

from syncbn.tracking.journal import number


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
        """The summary as JSON has it: numbers it lacks are words, as in the journal."""
        return asdict(self) | {"final": {name: number(x) for name, x in self.final.items()}}

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> "RunSummary":
        """The summary that `to_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: a tree of another kind.
        """
        final = {name: float(x) for name, x in tree["final"].items()}
        return RunSummary(**{**tree, "final": final})
