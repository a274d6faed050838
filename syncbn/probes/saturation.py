"""Probe `saturation`: the share of each layer's outputs where its nonlinearity is flat, and passes no gradient."""

from collections.abc import Callable

from torch import Tensor, nn

from syncbn.errors import UsageError
from syncbn.probes.base import Probe
from syncbn.probes.layers import by_unit, layers_of, require_hidden_layers, run_probe_images
from syncbn.probes.view import View


class Saturation(Probe):
    """The saturated share of what leaves each hidden layer's activation, over the probe images.

    sigmoid: outputs below .05 or above .95. tanh: outputs beyond +-.9. relu: units (of a convolution, channels) that
    are 0 on every image. The images have batch statistics of their own.

    Points: `saturation/<layer>`.
    """

    def __init__(self, view: View) -> None:
        require_hidden_layers(view, "saturation")
        self._layers = layers_of(view.model)[:-1]
        if view.cfg.model.activation not in SATURATED:
            raise UsageError(
                f"probe saturation with model.activation={view.cfg.model.activation} is not allowed: "
                f"one of {', '.join(SATURATED)}"
            )

    def look(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        saturated, shares = SATURATED[view.cfg.model.activation], {}

        def measure(number: int, left: Tensor) -> None:
            shares[f"saturation/{number}"] = float(saturated(left).double().mean())

        hooks = [
            (_known(layer.activation), lambda _, left, number=layer.number: measure(number, left))
            for layer in self._layers
        ]
        run_probe_images(view, *hooks)
        return shares


def _known(activation: nn.Module | None) -> nn.Module:
    assert activation is not None
    return activation


def _dead(left: Tensor) -> Tensor:
    return (by_unit(left) == 0).all(0)


SATURATED: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda left: (left - 0.5).abs() > 0.45,
    "tanh": lambda left: left.abs() > 0.9,
    "relu": _dead,
}
"""Of an activation's outputs (N, C, *), which are saturated: bool, an output or a unit."""
