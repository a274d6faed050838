"""Converted layers of other classes compute, over the ranks, what they compute on the whole batch."""

import copy

import pytest
import torch
from oracle import assert_close, forward_backward, own_part
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrize

import syncbn

SIZES = (2, 4)


class Named(nn.BatchNorm2d):
    """A subclass that leaves torch's forward alone."""


class Softplus(nn.Module):
    def forward(self, weight):
        return nn.functional.softplus(weight)


def _prelu():
    return BatchNormAct2d(4, act_layer=nn.PReLU)


def _with_drop():
    layer = BatchNormAct2d(4, act_layer=nn.SiLU)
    layer.drop = nn.Hardtanh()  # deterministic, unlike a real one
    return layer


def _parametrised():
    return parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", Softplus())


KINDS = [_prelu, _with_drop, lambda: Named(4, momentum=None), _parametrised]


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "kind", range(len(KINDS)), ids=["prelu", "drop", "subclass", "parametrised"]
)
def test_ranks_match_one_big_batch(world_size, kind):
    torch.manual_seed(2)
    layer = KINDS[kind]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.2, 1)
    oracle, x, dy = copy.deepcopy(layer), *torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    y, dx = forward_backward(oracle, x, dy)
    syncbn.convert_sync_batchnorm(layer, strict=True)
    own_y, own_dx = forward_backward(layer, own_part(x, SIZES), own_part(dy, SIZES))
    assert_close(own_y, own_part(y, SIZES), 1e-11, "output")
    assert_close(own_dx, own_part(dx, SIZES), 1e-11, "input gradient")
    for name, parameter in layer.named_parameters():
        summed = parameter.grad.clone()
        torch.distributed.all_reduce(summed)
        assert_close(summed, oracle.get_parameter(name).grad, 1e-11, name)
    for name, buffer in layer.named_buffers():
        assert_close(buffer.double(), oracle.get_buffer(name).double(), 1e-11, name)
    assert_close(layer.eval()(x), oracle.eval()(x), 1e-11, "evaluation")
