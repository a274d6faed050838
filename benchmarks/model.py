"""A whole training step under DistributedDataParallel, with other norm layers in one network.

What the norm layers cost is seen by taking them out: the same network with nothing in their place is one more arm.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from benchmarks.clock import interleaved, say, words
from benchmarks.contenders import Run
from benchmarks.naive import NaiveSyncBatchNorm


def measure(arch: str, images: tuple[int, int, int, int], budget_s: float) -> dict[str, Any]:
    """Median milliseconds of a step of the torchvision network `arch` with each kind of norm; called on every rank.

    Args:
        arch: "resnet18" or "resnet50".
        images: `(N, 3, H, W)` of a rank's batch.
        budget_s: seconds to spend.
    """
    x, target = torch.randn(*images), torch.randint(1000, (images[0],))
    runs = {name: _step(put(_network(arch)), x, target) for name, put in ARMS.items()}
    timed = interleaved(runs, budget_s)
    say(f"{arch} {words(timed)}")
    return {"arch": arch, "images": list(images), **timed}


def _network(arch: str) -> nn.Module:
    return torchvision.models.get_model(arch, weights=None)


def _step(network: nn.Module, x: Tensor, target: Tensor) -> Run:
    # No arm broadcasts buffers, so that arms differ in their norm layers alone.
    model = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()

    return step


def _naive(network: nn.Module) -> nn.Module:
    """The naive layer has the same state, so another class is all it takes."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = NaiveSyncBatchNorm
    return network


def _without(network: nn.Module) -> nn.Module:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return network


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ours": syncbn.convert_sync_batchnorm,
    "local": lambda network: network,
    "naive": _naive,
    "without": _without,
}
