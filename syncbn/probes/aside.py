"""Running a network outside its training; its state is restored afterwards.

Batch statistics of the probe images come from the norms' own weights and eps with a plain batch norm in their place,
all images as one group. So arms that share statistics differently are measured in the same way, without an exchange
between ranks, and no buffer moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.checkpoint import rng


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of `model`, of whatever arm, in order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever happens within, `model` has its buffers and modes, and `device` its random state, again afterwards."""
    state = rng.capture(device)
    buffers = [buffer.clone() for buffer in model.buffers()]
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        rng.restore(state, device)


@contextmanager
def norms_in_training(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by their batch, as the arm does in training; everything else (dropout) evaluates.

    Use within `undisturbed`: running statistics move.
    """
    model.eval()
    for norm in batch_norms(model):
        norm.train()
    yield
    model.eval()


@contextmanager
def own_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the mean and variance of all they are given; everything else evaluates."""
    modes = {module: module.training for module in model.modules()}
    norms = batch_norms(model)
    model.eval()
    for norm in norms:
        norm.forward = partial(_normalised, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for module, training in modes.items():
            module.training = training


def _normalised(norm: _BatchNorm, input: Tensor) -> Tensor:
    return batch_norm(input, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
