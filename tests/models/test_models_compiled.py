"""Every built-in model with synchronised batch norm compiles into one graph on ranks, and gives the same numbers."""

import copy

import pytest
import torch
from oracle import assert_close, own_part
from torch import nn

from syncbn.arms import apply_arm
from syncbn.config import ModelConfig, NormConfig
from syncbn.models import build_model

pytestmark = pytest.mark.untraced
MODELS = {
    "mlp": ModelConfig(hidden=[8, 8]),
    "cnn": ModelConfig(name="cnn", width=4),
    "vgg": ModelConfig(name="vgg", width=4),
    "resnet18": ModelConfig(name="torchvision", arch="resnet18"),
    "timm": ModelConfig(name="timm", arch="resnet10t"),
}
QUICK = ("cnn",)
SIZES = [3, 2]
"""Samples of each rank."""


@pytest.mark.slow_if(lambda name, backend, **_: backend == "inductor" or name not in QUICK)
@pytest.mark.world_size(2)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_ranks_compiles_into_one_graph(world_size, name, backend):
    if name == "timm":
        pytest.importorskip("timm")
    eager = apply_arm(build_model(MODELS[name], (3, 32, 32), 10, 0), NormConfig("sync")).double()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    x = own_part(torch.rand(sum(SIZES), 3, 32, 32, dtype=torch.float64), SIZES)
    classes = own_part(torch.arange(sum(SIZES)), SIZES)
    outputs = [_step(network, x, classes) for network in (compiled, eager)]
    assert_close(*outputs, 1e-9)
    for (what, ours), theirs in zip(other.named_parameters(), eager.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, 1e-9, what)
    for (what, ours), theirs in zip(other.named_buffers(), eager.buffers(), strict=True):
        assert_close(ours, theirs, 1e-9, what)


def _step(network, x, classes):
    output = network(x)
    nn.functional.cross_entropy(output, classes, reduction="sum").backward()
    return output.detach()
