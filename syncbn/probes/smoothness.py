"""Probe `smoothness`: how well the loss and its gradient predict both after a step along the gradient.

The three measures of Santurkar et al. (2018, "How does batch normalization help optimization?", section 3.1), each
at ten step lengths from half to four times the learning rate.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from syncbn.probes.base import Probe, require_one_process
from syncbn.probes.view import Batch, View

FACTORS = [0.5 + 3.5 * step / 9 for step in range(10)]
"""Step lengths eta, in learning rates."""
MEASURES: tuple[str, ...] = ("loss_range", "gradient_predictiveness", "effective_beta")

Weights = dict[str, Tensor]


class Smoothness(Probe):
    """What becomes of the loss L and the gradient g of the training batch, in training mode, at x - eta g.

    Points: `loss_range`, max - min over eta of L(x - eta g); `gradient_predictiveness`, max over eta of
    ||g - g(x - eta g)||; `effective_beta`, max over eta of ||g - g(x - eta g)|| / (eta ||g||). All gradients, g too,
    are computed under one dropout mask. Where a loss or gradient along the way is not a number, or g is 0, there is
    infinity, or no point.

    Finals: their geometric means over looks from `probe.first` on that have a training batch.

    Raises:
        UsageError: several real ranks.
    """

    def __init__(self, view: View) -> None:
        require_one_process(view, "smoothness")
        self._log_sums: dict[str, float] = dict.fromkeys(MEASURES, 0.0)
        self._looks = 0

    def look(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        if view.batch is None or view.lr == 0:
            return {}
        measured = along_gradient(view.model, view.batch, view.lr)
        if measured and view.counts:
            self._looks += 1
            for name, value in measured.items():
                self._log_sums[name] += math.log(value) if value > 0 else -math.inf
        return measured

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        del view
        if not self._looks:
            return dict.fromkeys(MEASURES, math.nan)
        return {name: _exp(total / self._looks) for name, total in self._log_sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """See `Probe`."""
        return {"log_sums": dict(self._log_sums), "looks": self._looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Probe`."""
        self._log_sums, self._looks = state["log_sums"], state["looks"]


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def along_gradient(model: nn.Module, batch: Batch, lr: float) -> dict[str, float]:
    """The measures by name; none where the gradient is 0."""
    here = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    _, gradient = loss_and_gradient(model, here, batch)
    length = _norm(gradient)
    if length == 0:
        return {}
    losses, changes, betas = [], [], []
    for eta in (factor * lr for factor in FACTORS):
        there = {name: p.sub(gradient[name], alpha=eta) for name, p in here.items()}
        loss, found = loss_and_gradient(model, there, batch)
        losses.append(loss)
        changes.append(_norm({name: found[name] - g for name, g in gradient.items()}))
        betas.append(changes[-1] / (eta * length))
    measured = (_worst(losses) - min(losses), _worst(changes), _worst(betas))
    return dict(zip(MEASURES, (x if x == x else math.inf for x in measured), strict=True))


def loss_and_gradient(model: nn.Module, weights: Weights, batch: Batch) -> tuple[float, Weights]:
    """The mean loss of `batch` in training mode at `weights`, and its gradient; `model` and its buffers stay."""
    weights = {name: p.clone().requires_grad_() for name, p in weights.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # The same dropout mask each time; `running` restores the random state.
    torch.manual_seed(0)
    logits = functional_call(model, {**weights, **buffers}, (batch.images,))
    loss = nn.functional.cross_entropy(logits, batch.labels)
    gradients = torch.autograd.grad(
        loss, list(weights.values()), allow_unused=True, materialize_grads=True
    )
    return float(loss.detach()), dict(zip(weights, gradients, strict=True))


def _norm(values: Weights) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in values.values()))


def _worst(values: list[float]) -> float:
    """The maximum, NaN if any value is."""
    return math.nan if any(map(math.isnan, values)) else max(values)
