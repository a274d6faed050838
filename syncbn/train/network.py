"""How the network runs in training: memory format, activation checkpointing, torch.compile and autocast around it.

Evaluation and probes run the network itself, eagerly: they are few, and their shapes would be compiled anew. With
defaults nothing is added, and the network is trained as it is.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from syncbn.config import TrainConfig
from syncbn.errors import UsageError
from syncbn.norm import SyncBatchNorm
from syncbn.norm.ops.recompute import unchanged
from syncbn.structure import mapped
from syncbn.train.precision import HALF, Autocast


def trained(model: nn.Module, cfg: TrainConfig, device: torch.device) -> nn.Module:
    """`model` as training runs it; `model` itself where `cfg` asks for nothing.

    Raises:
        UsageError: activation checkpointing of a model without a `nn.Sequential`.
    """
    network = model
    if cfg.channels_last:
        network = _ChannelsLast(model.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
    if cfg.checkpoint_activations and not checkpoint_parts(model):
        raise UsageError(
            f"train.checkpoint_activations=True is not allowed for a {type(model).__name__}, which has no "
            "nn.Sequential to cut into regions: false"
        )
    if cfg.compile:
        network = _Compiled(network)
    return Autocast(network, cfg.precision, device) if cfg.precision in HALF else network


class _ChannelsLast(nn.Module):
    """Gives `model` its images in the memory format channels_last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any, *rest: Any) -> Any:
        return self.model(mapped(images, _channels_last), *rest)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


class _Compiled(nn.Module):
    """`network`, compiled when it first sees a shape.

    Shapes are static: whether an odd batch was seen before then decides no bit of a batch that follows it, so that a
    resumed run continues bit for bit.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._compiled = (torch.compile(network, dynamic=False),)  # no second submodule

    def forward(self, *inputs: Any) -> Any:
        try:
            return self._compiled[0](*inputs)
        except RuntimeError as error:
            from torch._dynamo.exc import BackendCompilerFailed  # 2 s, which only this needs

            if not isinstance(error, BackendCompilerFailed):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"train.compile=True does not work here ({reason}): install a C++ compiler, or use false"
            ) from error


def checkpoint_parts(model: nn.Module) -> int:
    """Let each part of `model`'s Sequential children be a region of activation checkpointing; how many are.

    The activations of a part are dropped after the forward pass and computed again in the backward pass.
    """
    parts = sequential_parts(model)
    for part in parts:
        part.forward = _Region(part)
    return len(parts)


def sequential_parts(model: nn.Module) -> list[nn.Module]:
    """The items of `model`'s children that are a `nn.Sequential`: our networks' hidden layers, a ResNet's blocks."""
    children = [child for child in model.children() if isinstance(child, nn.Sequential)]
    return [part for child in children for part in child.children()]


class _Region:
    """Calls `part`'s own forward pass, checkpointed while it trains with gradients."""

    def __init__(self, part: nn.Module) -> None:
        self._part, self._forward = part, part.forward

    def __call__(self, *inputs: Any) -> Any:
        if not (self._part.training and torch.is_grad_enabled()):
            return self._forward(*inputs)
        return checkpoint(
            self._forward, *inputs, use_reentrant=False, context_fn=lambda: _contexts(self._part)
        )


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _statistics_kept(part)


@contextmanager
def _statistics_kept(part: nn.Module) -> Iterator[None]:
    """Norms move their running statistics in the first pass alone; synchronised ones see to that themselves."""
    with ExitStack() as stack:
        for norm in part.modules():
            if isinstance(norm, _BatchNorm) and not isinstance(norm, SyncBatchNorm):
                buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
                stack.enter_context(unchanged(*buffers))
        yield
