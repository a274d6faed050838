"""Measuring a run again, on its own test samples or on others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.after.find import Found
from syncbn.after.trained import Trained, open_run
from syncbn.compose import vary
from syncbn.config import Config, RunConfig
from syncbn.errors import UsageError
from syncbn.runtime.base import Solo
from syncbn.train.evaluation import evaluate, own_batches

GROUPS = ("data", "task")
KEYS = ("train.eval_batch", "train.device", "train.num_threads", "train.precision")
"""What can be another than in the run: the data, the task, and how it is computed."""


def measured_with(config: Config, overrides: Sequence[str]) -> RunConfig:
    """The config that a run of `config` is measured with.

    Raises:
        UsageError: an override of what decided the run's weights, or one that cannot be used.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in KEYS and key.partition(".")[0] not in GROUPS:
            raise UsageError(f"{override!r} is not allowed: {_why(key)}")
    return vary(config, overrides)


def _why(key: str) -> str:
    if key.startswith("launcher"):
        return "evaluate is one process, which takes the shares of all the run's ranks in turn"
    return f"a run is measured as it was trained; give {', '.join((*(f'{g}.*' for g in GROUPS), *KEYS))}"


def measure(
    found: Found, overrides: Sequence[str] = (), which: str | None = None
) -> dict[str, Any]:
    """The measures of the run `found` on the test split, with where they are from.

    Without overrides they are those of the run's own evaluation at that step, bit for bit: this process takes the
    shares of the run's ranks one after the other.

    Raises:
        SyncbnError: see `measured_with` and `open_run`; `NonFinite` where the loss is.
    """
    run = open_run(found, which, measured_with(found.config, overrides) if overrides else None)
    return {
        "run": str(found.folder),
        "checkpoint": run.checkpoint.path.name,
        "step": run.checkpoint.meta.step,
        "data": run.cfg.data.name,
        "num_samples": len(run.sets.test),
        "measures": measures(run),
    }


def measures(run: Trained) -> dict[str, float]:
    """`test_<name>` of the run's model over `run.sets.test`."""
    world_size = run.checkpoint.meta.world_size
    share: _Share | None = None
    found: dict[str, float] = {}
    for rank in range(world_size):
        share = _Share(run.device, rank, world_size, share)
        own = own_batches(len(run.sets.test), share, run.cfg.train.eval_batch)
        batches = run.sets.test.batches(own)
        with run.autocast():
            found, _ = evaluate(
                run.model, run.task, batches, share, run.dtype, run.sets.num_classes
            )
    run.model.eval()
    return found


class _Share(Solo):
    """One of the run's ranks, to whose collectives it and the ranks before it have come.

    Args:
        device: where the rank computes.
        rank: which it is.
        world_size: of how many.
        before: the rank before it, which has done what this one will do.
    """

    def __init__(
        self, device: torch.device, rank: int, world_size: int, before: "_Share | None"
    ) -> None:
        super().__init__(device)
        self.rank, self.world_size = rank, world_size
        self.sums: list[Tensor] = []
        self.gathered: list[list[Tensor]] = []
        self._sums_before = iter([] if before is None else before.sums)
        self._gathered_before = iter([] if before is None else before.gathered)

    def sum(self, values: Tensor) -> Tensor:
        """`values` and those of all ranks before."""
        before = next(self._sums_before, None)
        self.sums.append(values.clone() if before is None else before + values)
        return self.sums[-1]

    def gather(self, values: Tensor) -> list[Tensor]:
        """`values` after those of all ranks before."""
        self.gathered.append([*next(self._gathered_before, []), values])
        return self.gathered[-1]
