"""Probe `oracle`: whether the ranks compute what one process computes on the concatenated batch.

A second network with a textbook batch norm starts from the same weights and is trained along, on rank 0, by the same
rules on the whole global batch. What the ranks' network differs by is then written down, step by step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.errors import UsageError
from syncbn.models import build_model
from syncbn.optim import build_optimizer, set_rate
from syncbn.probes.base import Probe
from syncbn.probes.textbook import with_textbook_norms, without_norms
from syncbn.probes.view import View

KINDS = ("loss", "gradient", "buffers", "weights")
_TEXTBOOK_ARMS = ("none", "local", "local_avg", "sync", "sync_group", "big_batch", "torch_sync")


class Oracle(Probe):
    """The distance between the run and one process with a textbook batch norm on the whole batch, run along.

    A gap is max |a - b| / max |b|, over all tensors of a kind at once, b being the textbook's.

    Points: `oracle_gap_loss` and `oracle_gap_gradient` (before clipping) of the batch of the step to come,
    `oracle_gap_buffers` after its forward pass, `oracle_gap_weights` before it moves them. The last look, after the
    last step, has no batch and so the last two alone.

    Finals: the largest of each over looks from `probe.first` on.

    Raises:
        UsageError: an arm that has no textbook form, or dropout, whose masks the two could not share.
    """

    on_all_ranks = True  # the loss is a sum over ranks

    def __init__(self, view: View) -> None:
        _require_textbook(view)
        self._worst: dict[str, float] = {}
        self._twin = _Twin(view) if view.runtime.is_main else None

    def watch(self, view: View) -> None:
        """See `Probe`."""
        if self._twin is not None:
            self._twin.follow(view)

    def look(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        loss = None if view.batch is None else view.runtime.sum(view.batch.share.detach().clone())
        if self._twin is None:
            return {}
        gaps = self._twin.gaps(view.model, loss)
        if view.counts:
            self._worst |= {
                kind: max(gap, self._worst.get(kind, 0.0)) for kind, gap in gaps.items()
            }
        return {f"oracle_gap_{kind}": gap for kind, gap in gaps.items()}

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        del view
        return {f"oracle_gap_{kind}": self._worst.get(kind, math.nan) for kind in KINDS}

    def state_dict(self) -> dict[str, Any]:
        """See `Probe`."""
        twin = None if self._twin is None else self._twin.state_dict()
        return {"worst": dict(self._worst), "twin": twin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Probe`."""
        self._worst = state["worst"]
        if self._twin is not None:
            self._twin.load_state_dict(state["twin"])


class _Twin:
    """The second network. Its optimiser's step waits until the gradients have been compared."""

    def __init__(self, view: View) -> None:
        cfg = view.cfg
        model = build_model(cfg.model, view.sets.shape, view.sets.num_classes, cfg.seed)
        self.model = (
            without_norms(model)
            if cfg.norm.name == "none"
            else with_textbook_norms(model, cfg.norm.eps, cfg.norm.momentum)
        ).to(view.runtime.device, view.dtype)
        self.optimizer = build_optimizer(self.model, cfg.optim)
        self.clip_norm = cfg.optim.clip_norm
        self.loss = torch.zeros(())
        self.step_is_due = False

    def follow(self, view: View) -> None:
        """Compute the gradients of the whole batch of the view's step."""
        self.settle()
        images, labels = view.fetch(view.sets.train, view.stream.batch(view.step), view.step)
        set_rate(self.optimizer, view.lr)
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.loss, self.step_is_due = loss.detach(), True

    def settle(self) -> None:
        """Take the optimiser's step that is due, if one is."""
        if self.step_is_due:
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step_is_due = False

    def gaps(self, model: nn.Module, loss: Tensor | None) -> dict[str, float]:
        """How far `model`, and the `loss` of a batch where there is one, lie from this network's, by kind."""
        ours, theirs = dict(model.named_parameters()), dict(self.model.named_parameters())
        found = {}
        if loss is None:
            self.settle()
        else:
            found["loss"] = gap({"": loss}, {"": self.loss})
            found["gradient"] = gap(_gradients(ours), _gradients(theirs))
        found["buffers"] = gap(dict(model.named_buffers()), dict(self.model.named_buffers()))
        return found | {"weights": gap(ours, theirs)}

    def state_dict(self) -> dict[str, Any]:
        """The network and its optimiser, as after the last step."""
        self.settle()
        return {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def gap(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest |a - b| over the largest |b| of all tensors in `theirs`; infinity where one is NaN; 0 of none."""
    if not theirs:
        return 0.0
    pairs = [(ours[name].detach().double(), b.detach().double()) for name, b in theirs.items()]
    scale = max(float(b.abs().max()) for _, b in pairs)
    worst = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    if worst == 0:
        return 0.0
    return worst / scale if scale > 0 and math.isfinite(worst) else math.inf


def _gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def _require_textbook(view: View) -> None:
    arm, dropout = view.cfg.norm.name, view.cfg.model.dropout
    if arm not in _TEXTBOOK_ARMS:
        raise UsageError(
            f"probe oracle with norm={arm} is not allowed: one of {', '.join(_TEXTBOOK_ARMS)}"
        )
    if dropout:
        raise UsageError(
            f"probe oracle with model.dropout={dropout:g} is not allowed: 0, since masks would differ"
        )
