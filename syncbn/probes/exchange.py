"""Probe `exchange`: what synchronising costs a step, in time and in bytes, layer by layer.

It observes the exchanges of rank 0 alone (`Exchange.observer`): two readings of a clock for each of them.
"""

from statistics import median
from typing import Any

from syncbn.norm.comm.exchange import Exchange
from syncbn.probes.base import Probe
from syncbn.probes.view import View

WARM_UP = 20
"""Steps at the start of each attempt that are not timed."""


class ExchangeCost(Probe):
    """Time of a step, and the part of it that the norm layers of rank 0 spend in exchanges, waits included.

    Finals, medians over all steps but the first 20 of an attempt (NaN where there are no others): `step_ms`, from the
    end of a backward pass to that of the next, without what other probes took; `exchange_ms`, and
    `exchange_ms/<layer>`, forward and backward together; `exchange_share`, exchange_ms / step_ms. A step's bytes are
    those that this rank contributes, `exchange_bytes` and `exchange_bytes/<layer>`; each rank receives as many from
    every other. Arms that exchange nothing leave 0. Medians of layers need not add up to that of the step.
    """

    def __init__(self, view: View) -> None:
        del view
        self._current: dict[str, list[float]] = {}
        """Layer to bytes and seconds since the last step's backward pass."""
        self._seen = 0
        self._steps: list[float] = []
        """Seconds of each step."""
        self._exchanges: list[float] = []
        self._layers: dict[str, list[float]] = {}
        """Layer to seconds of each step."""
        self._bytes: dict[str, int] = {}
        """Layer to bytes of the last step."""

    def open(self) -> None:
        """See `Probe`."""
        Exchange.observer = self._told

    def close(self) -> None:
        """See `Probe`."""
        Exchange.observer = None

    def _told(self, layer: str, kind: int, num_bytes: int, seconds: float) -> None:
        del kind
        so_far = self._current.setdefault(layer, [0, 0.0])
        so_far[0] += num_bytes
        so_far[1] += seconds

    def watch(self, view: View) -> None:
        """See `Probe`."""
        told, self._current = self._current, {}
        self._bytes = {layer: int(num_bytes) for layer, (num_bytes, _) in told.items()}
        self._seen += 1
        if self._seen <= WARM_UP or view.lap_s is None:
            return
        self._steps.append(view.lap_s)
        self._exchanges.append(sum(seconds for _, seconds in told.values()))
        for layer, (_, seconds) in told.items():
            self._layers.setdefault(layer, []).append(seconds)

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        del view
        step_ms, exchange_ms = _median_ms(self._steps), _median_ms(self._exchanges)
        layers = {f"exchange_ms/{layer}": _median_ms(s) for layer, s in self._layers.items()}
        layers |= {f"exchange_bytes/{layer}": float(n) for layer, n in self._bytes.items()}
        return layers | {
            "step_ms": step_ms,
            "exchange_ms": exchange_ms,
            "exchange_share": exchange_ms / step_ms,
            "exchange_bytes": float(sum(self._bytes.values())),
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Probe`."""
        return {
            "steps": list(self._steps),
            "exchanges": list(self._exchanges),
            "layers": {layer: list(seconds) for layer, seconds in self._layers.items()},
            "bytes": dict(self._bytes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Probe`."""
        self._steps, self._exchanges = state["steps"], state["exchanges"]
        self._layers, self._bytes = state["layers"], state["bytes"]


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * median(seconds) if seconds else float("nan")
