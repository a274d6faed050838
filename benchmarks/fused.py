"""Residual and activation inside the layer, against the three operations one after another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from benchmarks.cases import Case, all_cases
from benchmarks.clock import interleaved, say, words
from benchmarks.contenders import Run, forward_backward


def measure(
    budget_s: float, shapes: Sequence[Sequence[int]], layouts: Sequence[str]
) -> list[dict[str, Any]]:
    """A row a case in float32, with the median milliseconds of both ways; called on every rank."""
    rows = []
    for case in all_cases(tuple((n, c, h, w) for n, c, h, w in shapes), tuple(layouts), ("fp32",)):
        rows.append({**case.row(), **interleaved(_runs(case), budget_s)})
        say(f"{case} {words(rows[-1])}")
    return rows


def _runs(case: Case) -> dict[str, Run]:
    x, gradients = case.tensor(requires_grad=True), [case.tensor(), case.tensor()]
    residual = case.tensor(requires_grad=True)
    channels = case.shape[1]
    return {
        "fused": forward_backward(_Fused(channels, residual), x, gradients),
        "sequence": forward_backward(_Sequence(channels, residual), x, gradients),
    }


class _Fused(nn.Module):
    """act(norm(x) + residual) in one; the residual is a parameter so that its gradient is computed."""

    def __init__(self, channels: int, residual: Tensor) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(channels, act="relu")
        self.residual = nn.Parameter(residual.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, residual=self.residual)


class _Sequence(_Fused):
    """The same as norm, add, relu."""

    def __init__(self, channels: int, residual: Tensor) -> None:
        super().__init__(channels, residual)
        self.norm = syncbn.SyncBatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.norm(x).add_(self.residual))
