"""Probe `shift`: how far the mean input of each layer moves from look to look, and whether deeper layers' move more.

Ioffe & Szegedy (2015, section 1) argue that small changes to early layers amplify as the network becomes deeper, and
measure nothing of it. The measure here is a distance in standard deviations, so that layers can be compared.
"""

import math
from typing import Any

import torch
from torch import Tensor

from syncbn.probes.base import Probe
from syncbn.probes.layers import by_unit, layers_of, run_probe_images
from syncbn.probes.view import View


class Shift(Probe):
    """Distance between the means of each layer's input at two consecutive looks, in its standard deviation.

    shift(l) = ||mu_l(t) - mu_l(t - k)|| / (sd_l(t) sqrt(d)), with mu_l (d,) the mean over the probe images of what
    enters layer l's linear map or convolution (over positions too), and sd_l^2 the mean over units of their variance.
    The images have batch statistics of their own.

    Points: `shift/<layer>` from layer 2 on: layer 1 is given the images, which do not move. A layer whose input is the
    same for all images has no scale, and no point.

    Final: `shift_slope`, the least-squares slope of log(mean over looks of the shift) against the layer's number, over
    looks from `probe.first` on.
    """

    def __init__(self, view: View) -> None:
        self._layers = layers_of(view.model)[1:]
        self._before: dict[int, Tensor] = {}
        self._sums: dict[int, list[float]] = {}
        """Layer to the sum of its shifts, and their number."""

    def look(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        shifts: dict[int, float] = {}
        for layer, (mean, variance) in self._moments(view).items():
            sd = float(variance.mean().sqrt())
            if layer in self._before and sd > 0:
                moved = (mean - self._before[layer]).square().mean().sqrt()
                shifts[layer] = float(moved) / sd
            self._before[layer] = mean
        if view.counts:
            for layer, shift in shifts.items():
                total, looks = self._sums.get(layer, [0.0, 0])
                self._sums[layer] = [total + shift, looks + 1]
        return {f"shift/{layer}": shift for layer, shift in shifts.items()}

    def _moments(self, view: View) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean and variance (d,) of each layer's input, float64 on the CPU."""
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def measure(number: int, entered: Tensor) -> None:
            variance, mean = torch.var_mean(by_unit(entered).double(), dim=0, correction=0)
            found[number] = mean.cpu(), variance.cpu()

        hooks = [
            (layer.affine, lambda entered, _, number=layer.number: measure(number, entered))
            for layer in self._layers
        ]
        run_probe_images(view, *hooks)
        return found

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        del view
        means = {layer: total / looks for layer, (total, looks) in self._sums.items()}
        return {"shift_slope": slope({k: math.log(v) for k, v in means.items() if v > 0})}

    def state_dict(self) -> dict[str, Any]:
        """See `Probe`."""
        return {"before": dict(self._before), "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Probe`."""
        self._before, self._sums = state["before"], state["sums"]


def slope(points: dict[int, float]) -> float:
    """The slope of the least-squares line through `points`, x to y; NaN for fewer than two."""
    if len(points) < 2:
        return math.nan
    x = torch.tensor(list(points), dtype=torch.float64)
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
