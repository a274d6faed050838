"""Layers that are begun, where there is nobody to meet: any layer may be, and gives what it gives when called."""

import copy

import pytest
import torch
from oracle import batch_norm
from torch import nn

import syncbn
from syncbn.norm.joint import joint_name

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "batch norm": lambda: batch_norm(3),
    "synchronised": lambda: syncbn.convert_sync_batchnorm(batch_norm(3)),
    "group norm": lambda: nn.GroupNorm(1, 3),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_finishing_is_calling(kind, training):
    layer = LAYERS[kind]().train(training)
    called = copy.deepcopy(layer)
    begun, other = syncbn.begin_norms((layer, X), (nn.Identity(), X))
    assert torch.equal(begun.finish(), called(X))
    assert torch.equal(other.finish(X), X + X)
    with torch.no_grad():
        (again,) = syncbn.begin_norms((layer, X))
        assert torch.equal(again.finish(), called(X))
    for ours, expected in zip(layer.buffers(), called.buffers(), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(RuntimeError, match="called twice"):
        begun.finish()


def test_masks_and_residuals_reach_the_layer():
    layer = syncbn.SyncBatchNorm(3, act="relu")
    mask = torch.rand(4, 1, 5, 5) < 0.5
    expected = copy.deepcopy(layer)(X, mask, X)
    (begun,) = syncbn.begin_norms((layer, X, mask))
    assert torch.equal(begun.finish(residual=X), expected)
    with pytest.raises(ValueError, match="a mask was given for a BatchNorm2d, which takes none"):
        syncbn.begin_norms((batch_norm(3), X, mask))


def test_a_layer_that_was_begun_is_as_it_was_afterwards():
    layer = syncbn.SyncBatchNorm(3)
    before = dict(layer.__dict__)
    (begun,) = syncbn.begin_norms((layer, X))
    with pytest.raises(ValueError, match="expected a residual of shape"):
        begun.finish(residual=X[:2])
    assert layer.__dict__.keys() == before.keys()


@pytest.mark.parametrize(
    ("names", "joint"),
    [
        (["bn1"], "bn1"),
        (["bn3", "shortcut.1"], "{bn3, shortcut.1}"),
        (["layer1.0.bn3", "layer1.0.downsample.1"], "layer1.0.{bn3, downsample.1}"),
        (["a.b", "a.b.c"], "a.{b, b.c}"),
        (["a.b", "a.b"], "a.{b, b}"),
    ],
)
def test_several_layers_are_named_by_what_they_have_in_common(names, joint):
    assert joint_name(names) == joint
