"""The two last norms of a residual block, called one after the other or begun together, by each way of an exchange."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from benchmarks.cases import Case
from benchmarks.clock import interleaved, say, words
from benchmarks.contenders import Run, forward_backward, group_by

WAYS = ("sockets", "gloo")
"""Where ranks share memory, layers that are begun together are called one by one."""
FORMS = ("called", "together", "overlapped")


def measure(budget_s: float, shapes: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row a shape of a block's output, float32 in planes, with median milliseconds; called on every rank."""
    rows = []
    for n, c, h, w in shapes:
        case = Case((n, c, h, w))
        runs = {f"{form}_{way}": _run(case, form, way) for way in WAYS for form in FORMS}
        rows.append({**case.row(), **interleaved(runs, budget_s)})
        say(f"{case} {words(rows[-1])}")
    return rows


def _run(case: Case, form: str, way: str) -> Run:
    n, c, h, w = case.shape
    block = Block(c, form, group_by(way))
    x = torch.randn(n, c // 2, h, w, requires_grad=True)
    return forward_backward(block, x, [case.tensor(), case.tensor()])


class Block(nn.Module):
    """The end of a residual block that widens: two 1x1 convolutions, a norm after each, their sum, ReLU.

    Args:
        channels: of the output; half as many come in.
        form: one of `FORMS`. "together" is one exchange for both norms; "overlapped" begins the first before the second
            convolution.
        group: of the norms.
    """

    def __init__(self, channels: int, form: str, group: Any) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.shortcut = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.main_norm = syncbn.SyncBatchNorm(channels, process_group=group, act="relu")
        self.shortcut_norm = syncbn.SyncBatchNorm(channels, process_group=group)
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "called": self._called,
            "together": self._together,
            "overlapped": self._overlapped,
        }
        self._form = forms[form]

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of both norms' outputs, `(N, C, H, W)` from `(N, C / 2, H, W)`."""
        return self._form(x)

    def _called(self, x: Tensor) -> Tensor:
        side = self.shortcut_norm(self.shortcut(x))
        return self.main_norm(self.main(x), residual=side)

    def _together(self, x: Tensor) -> Tensor:
        main, side = syncbn.begin_norms(
            (self.main_norm, self.main(x)), (self.shortcut_norm, self.shortcut(x))
        )
        return main.finish(residual=side.finish())

    def _overlapped(self, x: Tensor) -> Tensor:
        (main,) = syncbn.begin_norms((self.main_norm, self.main(x)))
        side = self.shortcut_norm(self.shortcut(x))
        return main.finish(residual=side)
