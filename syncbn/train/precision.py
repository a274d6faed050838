"""Precision of a run: autocast around the network, and the scaled loss that float16 needs.

With bf16 and fp16 parameters, their gradients and the optimiser stay float32, and so do the statistics of norms; only
what autocast lists runs in half precision. A loss is computed from float32 outputs. fp16's small gradients would become
0, so its loss is scaled (`torch.amp.GradScaler`); a step whose gradients overflow is skipped and the scale halved.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.errors import NonFinite
from syncbn.structure import mapped

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of autocast by `train.precision`; others run without."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What a forward pass runs in; nothing for float32 and float64."""
    half = HALF.get(precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)


class Autocast(nn.Module):
    """`model` under autocast, with float32 outputs, so that the loss is computed in float32."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.model, self.precision, self.device = model, precision, device

    def forward(self, *inputs: Any) -> Any:
        """As `model`."""
        with autocast(self.precision, self.device):
            outputs = self.model(*inputs)
        return mapped(outputs, _in_float32)


def _in_float32(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.is_floating_point() else outputs


class LossScale:
    """The scaler of fp16's loss. Its scale is the same on all ranks, since it follows the reduced gradients."""

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type)

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss`, times the scale."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of `optimizer`, which are then fit to be looked at and clipped."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimiser's step, unless a gradient is not finite, and adapt the scale."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def require_usable(self) -> float:
        """The scale.

        Raises:
            NonFinite: it fell below 1: gradients overflow without it too, and no step was taken for long.
        """
        scale = float(self._scaler.get_scale())
        if scale < 1:
            raise NonFinite(
                f"gradients are not finite in train.precision=fp16, whatever their scale ({scale:g}): lower optim.lr, "
                "or use train.precision=bf16"
            )
        return scale

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._scaler.load_state_dict(state)


def loss_scale(precision: str, device: torch.device) -> LossScale | None:
    """The scaler that `precision` needs, or None."""
    return LossScale(device) if precision == "fp16" else None
