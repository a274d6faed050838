"""Textbook batch norm, written from the formulas: the reference for the layers of an arm.

It shares no code with what it checks, neither ours nor torch's batch norm. Its gradient is autograd's, of plain
arithmetic.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class TextbookBatchNorm(nn.Module):
    """Algorithm 1 of Ioffe & Szegedy (2015), with running averages, for inputs (N, C, *).

    y = (x - mean) / sqrt(var + eps) * weight + bias with mean and biased variance over all axes but C. Running
    averages move by momentum towards the mean and the unbiased variance, n / (n - 1) times the biased one. Names in
    the state dict are those of `torch.nn.BatchNorm*d`.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the newest batch.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """`x`, normalised by its own statistics."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        n = x.numel() / x.shape[1]
        mean = x.sum(axes) / n
        centred = x - mean.view(shape)
        var = (centred * centred).sum(axes) / n
        with torch.no_grad():
            self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
            self.running_var.mul_(1 - self.momentum).add_(self.momentum * var * n / (n - 1))
        y = centred / (var.view(shape) + self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


def with_textbook_norms(model: nn.Module, eps: float, momentum: float) -> nn.Module:
    """`model` with a fresh `TextbookBatchNorm` for every batch norm in it."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, TextbookBatchNorm(child.num_features, eps, momentum))
        else:
            with_textbook_norms(child, eps, momentum)
    return model


def without_norms(model: nn.Module) -> nn.Module:
    """`model` with nothing where it had batch norms."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, nn.Identity())
        else:
            without_norms(child)
    return model
