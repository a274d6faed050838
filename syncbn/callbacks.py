"""Callbacks: code of extensions that a run calls at four moments, on every rank.

What a callback draws from the global generators is decided by seed, step, moment and rank, and changes none of the
run's own random numbers: a run that is only observed has the bits of one that is not.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncbn.data.chance import isolated, seed_generators, seed_of
from syncbn.errors import UsageError
from syncbn.registry import CALLBACKS
from syncbn.runtime.base import Runtime

Record = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Moment:
    """What a callback sees of a run. It changes nothing by itself; `model` is the network that is trained."""

    step: int
    """Optimiser steps done."""
    steps: int
    """Those that the run may take."""
    model: nn.Module
    measured: Mapping[str, float]
    """The last evaluation, such as `test_error`; empty before the first."""
    rank: int
    world_size: int
    folder: Path
    """Of the run's files."""
    _record: Record
    _asked: list[str] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that should write files."""
        return self.rank == 0

    def record(self, **values: float) -> None:
        """Record `values` as metrics of this step; those of rank 0 count."""
        self._record(self.step, {name: float(value) for name, value in values.items()})

    def stop(self) -> None:
        """Ask the run to end well; it measures, saves and ends when ranks next agree (`train.agree_every`)."""
        self._asked.append("stop")


class Callback:
    """Does nothing; a callback overrides what it needs. Each method is called on every rank."""

    def start(self, moment: Moment) -> None:
        """Before the first step of an attempt."""

    def after_step(self, moment: Moment) -> None:
        """After each optimiser step."""

    def after_evaluation(self, moment: Moment) -> None:
        """After each evaluation."""

    def end(self, moment: Moment) -> None:
        """After the last step and its evaluation, before the last checkpoint; not when a run is interrupted."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors to have again when a run resumes; rank 0's are saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


class Callbacks:
    """The callbacks of a run in their order; false where it has none.

    Args:
        chosen: the options of each by name.
        runtime: of the rank.
        seed: of the run, which decides what callbacks draw.
    """

    def __init__(self, chosen: Mapping[str, Any], runtime: Runtime, seed: int) -> None:
        self._runtime, self._seed, self._step = runtime, seed, 0
        self._asked: list[str] = []
        self._all: dict[str, Callback] = {}
        for name, given in chosen.items():
            entry = CALLBACKS[name]
            keywords = entry.typed(given or {})
            made = self._guarded(name, "__init__", lambda e=entry, k=keywords: e.build(**k))
            if not isinstance(made, Callback):
                raise UsageError(
                    f"callback {name} is a {type(made).__name__}: derive it from syncbn.extend.Callback"
                )
            self._all[name] = made

    def __bool__(self) -> bool:
        return bool(self._all)

    def call(self, what: str, **seen: Any) -> None:
        """Call the method `what` of each with a `Moment` of what is `seen`.

        Raises:
            UsageError: one raised; names it, the moment and the line.
        """
        self._step = seen["step"]
        moment = Moment(
            **seen,
            rank=self._runtime.rank,
            world_size=self._runtime.world_size,
            _asked=self._asked,
        )
        for name, callback in self._all.items():
            self._guarded(name, what, lambda c=callback: getattr(c, what)(moment))

    def want_to_stop(self) -> bool:
        """Whether one on any rank has asked the run to stop; a collective."""
        asked = torch.tensor(float(bool(self._asked)), device=self._runtime.device)
        return bool(self._runtime.sum(asked))

    def state_dict(self) -> dict[str, Any]:
        """The states of all by name; raises `UsageError` for one that is no dict."""
        states = {n: self._guarded(n, "state_dict", c.state_dict) for n, c in self._all.items()}
        for name, state in states.items():
            if not isinstance(state, dict):
                raise UsageError(
                    f"state_dict of callback {name} gave a {type(state).__name__}: a dict is needed"
                )
        return states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        for name, callback in self._all.items():
            given = state[name]
            self._guarded(name, "load_state_dict", lambda c=callback, g=given: c.load_state_dict(g))

    def _guarded(self, name: str, what: str, call: Callable[[], Any]) -> Any:
        """`call()` with random numbers of its own; an error without an exit code becomes one line."""
        rank, device = self._runtime.rank, self._runtime.device
        try:
            with isolated(device):
                seed_generators(seed_of(self._seed, self._step, rank, name, what))
                return call()
        except Exception as error:
            if hasattr(error, "exit_code"):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if Path(f.filename) != Path(__file__)] or frames
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"callback {name} failed in {what} at {Path(own[-1].filename).name}:{own[-1].lineno} "
                f"on rank {rank} ({reason})"
            ) from error
