"""The probes of a run: when they measure, how they leave the run as it was, and how results reach every rank.

Probes measure after the backward pass of a due step and before the optimiser's step, so they see weights, their
gradients and the batch that made them, all of one moment. Step 0 is due, every `probe.every`-th step is, and so is the
end, where there is no batch any more.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import torch

from syncbn.probes.aside import undisturbed
from syncbn.probes.base import Probe
from syncbn.probes.registry import PROBES
from syncbn.probes.view import Batch, View
from syncbn.runtime.base import Runtime


class Probes:
    """The probes that `probe.names` names; false where it names none, and then nothing else is to be called.

    Args:
        view: the run at step 0.

    Raises:
        UsageError: a probe that cannot look at this run.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        made = {name: PROBES[name](view) for name in view.cfg.probe.names}
        main = view.runtime.is_main
        self._probes = {name: one for name, one in made.items() if main or one.on_all_ranks}
        self._named = bool(made)
        self._looked_at = -1
        self._released: float | None = None

    def __bool__(self) -> bool:
        return self._named

    def __enter__(self) -> Self:
        for probe in self._all():
            probe.open()
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self._all():
            probe.close()

    def _all(self) -> Iterator[Probe]:
        yield from self._probes.values()

    def before_step(self, step: int, lr: float, batch: Batch) -> dict[str, float]:
        """What is seen before the optimiser's step, number `step` from 0, if it is due; every rank calls it.

        Args:
            step: optimiser steps done.
            lr: of the step to come.
            batch: whose gradients are in place.

        Returns:
            Points of `step` by metric, on rank 0.
        """
        lap = None if self._released is None else time.perf_counter() - self._released
        view = replace(self._view, step=step, lr=lr, batch=batch, lap_s=lap)
        for probe in self._all():
            probe.watch(view)
        every = view.cfg.probe.every
        points = self._look(view) if step == 0 or (every > 0 and step % every == 0) else {}
        self._released = time.perf_counter()
        return points

    def after_last(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """The last look, without a batch, and what joins the final metrics, on every rank; every rank calls it.

        Called again after a resumption at the very end, it concludes the same.
        """
        view = replace(self._view, step=step)
        points = self._look(view)
        finals: dict[str, float] = {}
        for probe in self._all():
            with undisturbed(view.model, view.runtime.device):
                finals |= probe.conclude(view)
        return points, _of_main(finals, view.runtime)

    def _look(self, view: View) -> dict[str, float]:
        points: dict[str, float] = {}
        if view.step == self._looked_at:
            return points  # what was saved after the last look goes on from after it
        with undisturbed(view.model, view.runtime.device):
            for probe in self._all():
                points |= probe.look(view)
        self._looked_at = view.step
        return points

    def state_dict(self) -> dict[str, Any]:
        """What the probes have summed up: plain values for a checkpoint; empty without probes."""
        if not self._named:
            return {}
        states = {name: probe.state_dict() for name, probe in self._probes.items()}
        return {"looked_at": self._looked_at, "probes": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what rank 0's `state_dict` gave."""
        if not state:
            return
        self._looked_at = state["looked_at"]
        for name, probe in self._probes.items():
            probe.load_state_dict(state["probes"][name])


def _of_main(finals: dict[str, float], runtime: Runtime) -> dict[str, float]:
    """Rank 0's `finals` on every rank, whatever others have."""
    if runtime.world_size == 1:
        return finals
    text = torch.tensor(list(json.dumps(finals).encode()), dtype=torch.uint8)
    size = runtime.from_main(torch.tensor([len(text)], device=runtime.device))
    row = torch.zeros(int(size), dtype=torch.uint8, device=runtime.device)
    if runtime.is_main:
        row.copy_(text)
    return json.loads(bytes(runtime.from_main(row).tolist()))
