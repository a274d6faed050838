"""What the tests of probes share: a view of a tiny network on data that a reader can compute with."""

import torch
from torch import Tensor, nn

from syncbn.config import RunConfig
from syncbn.data import DataSets
from syncbn.data.memory import ReadySplit
from syncbn.probes import Batch, View
from syncbn.runtime import Solo
from syncbn.sampling import SampleStream

SOLO = Solo(torch.device("cpu"))


def column(*values: float) -> Tensor:
    """Images (n, 1) of one value each; tests need no more axes than their networks."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def split(images: Tensor, labels: Tensor | None = None) -> ReadySplit:
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    return ReadySplit(images, labels)


def view_of(
    model: nn.Module,
    test: ReadySplit,
    train: ReadySplit | None = None,
    cfg: RunConfig | None = None,
    **fields: object,
) -> View:
    """A view of `model` in float64, on one process."""
    cfg = cfg or RunConfig()
    cfg.train.precision = "float64"
    sets = DataSets(train or test, test, num_classes=2, shape=(1, 1, 1))
    labels = sets.train.labels if cfg.train.shares == "by_class" else None
    cfg.train.per_rank_batch = min(cfg.train.per_rank_batch, len(sets.train))
    stream = SampleStream(len(sets.train), cfg.global_batch, cfg.seed, labels=labels)
    return View(cfg, SOLO, sets, stream, model.double(), **fields)


def batch(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, len(labels), torch.zeros(()))


class Block(nn.Sequential):
    """A hidden layer whose parts have the names of `syncbn.models.hidden_layer`."""

    def __init__(self, affine: nn.Module, activation: nn.Module, norm: nn.Module | None = None):
        super().__init__()
        self.affine = affine
        if norm is not None:
            self.norm = norm
        self.activation = activation


class Net(nn.Module):
    """Hidden layers, then a linear output, as the networks of `syncbn.models` are laid out."""

    def __init__(self, *hidden: nn.Module, width: int = 1):
        super().__init__()
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.hidden(images))


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    """A linear map with these weights."""
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer
