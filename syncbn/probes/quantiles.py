"""Probe `quantiles`: how the distribution that enters the last nonlinearity moves while the network trains.

After Ioffe & Szegedy (2015, figure 1b and c): the {15, 50, 85}th percentiles of what enters one unit of the last hidden
layer. One unit is an anecdote, so the final number is the median over all of the layer's units.
"""

import math
from typing import Any

import torch
from torch import Tensor

from syncbn.probes.base import Probe
from syncbn.probes.layers import hidden_blocks, require_hidden_layers, run_probe_images
from syncbn.probes.view import View

LEVELS = {"15": 0.15, "50": 0.5, "85": 0.85}


class Quantiles(Probe):
    """Percentiles of each unit's pre-activation over the probe images, which have batch statistics of their own.

    The pre-activation is the input of the last hidden layer's activation; of a convolution, the unit at the image's
    centre in each channel.

    Points: `quantile/15`, `quantile/50` and `quantile/85` of unit 0.

    Finals, over looks from `probe.first` on: `quantile_range`, the median over units of
    mean over percentiles of (its maximum - its minimum over looks) / mean over looks of (85th - 15th), and
    `quantile_range_unit0`, that of unit 0. A unit that never moves and has no spread is left out of the median.
    """

    def __init__(self, view: View) -> None:
        require_hidden_layers(view, "quantiles")
        self._lowest: Tensor | None = None
        self._highest: Tensor | None = None
        self._spread: Tensor | None = None
        self._looks = 0

    def look(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        quantiles = _quantiles(view)
        if view.counts:
            self._count(quantiles)
        return {f"quantile/{name}": float(q[0]) for name, q in zip(LEVELS, quantiles, strict=True)}

    def _count(self, quantiles: Tensor) -> None:
        spread = quantiles[-1] - quantiles[0]
        if self._lowest is None or self._highest is None or self._spread is None:
            self._lowest = self._highest = quantiles
            self._spread = spread
        else:
            self._lowest = self._lowest.minimum(quantiles)
            self._highest = self._highest.maximum(quantiles)
            self._spread = self._spread + spread
        self._looks += 1

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        del view
        if self._lowest is None or self._highest is None or self._spread is None:
            return {"quantile_range": math.nan, "quantile_range_unit0": math.nan}
        moved = (self._highest - self._lowest).mean(0)
        ratio = moved / (self._spread / self._looks)
        return {
            "quantile_range": float(ratio.nanmedian()),
            "quantile_range_unit0": float(ratio[0]),
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Probe`."""
        return {
            "lowest": self._lowest,
            "highest": self._highest,
            "spread": self._spread,
            "looks": self._looks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Probe`."""
        self._lowest, self._highest = state["lowest"], state["highest"]
        self._spread, self._looks = state["spread"], state["looks"]


def _quantiles(view: View) -> Tensor:
    """The percentiles of each unit, (3, units), float64 on the CPU."""
    found: list[Tensor] = []

    def measure(entered: Tensor, _: Tensor) -> None:
        units = _central(entered).double().cpu()
        levels = torch.tensor(list(LEVELS.values()), dtype=torch.float64)
        found.append(units.quantile(levels, dim=0))

    run_probe_images(view, (hidden_blocks(view.model)[-1].get_submodule("activation"), measure))
    return found[0]


def _central(values: Tensor) -> Tensor:
    """`values` (N, C, *) at the middle of each position axis: (N, C)."""
    for size in values.shape[2:]:
        values = values.select(2, size // 2)
    return values
