"""Probe `gradients`: how large each layer's gradient is, the first sign of one that vanishes or explodes."""

import torch

from syncbn.probes.base import Probe
from syncbn.probes.layers import layers_of
from syncbn.probes.view import View


class Gradients(Probe):
    """The Euclidean norm of the training loss's gradient in each layer's weight, averaged over ranks, unclipped.

    Points: `grad_norm/<layer>`, at every look that has a training batch.
    """

    def __init__(self, view: View) -> None:
        self._weights = {layer.number: layer.affine.weight for layer in layers_of(view.model)}

    def look(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        if view.batch is None:
            return {}
        return {
            f"grad_norm/{number}": float(torch.linalg.vector_norm(weight.grad.double()))
            for number, weight in self._weights.items()
            if isinstance(weight, torch.Tensor) and weight.grad is not None
        }
