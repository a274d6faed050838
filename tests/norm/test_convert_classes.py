"""Conversion of norm layers beyond torch's own classes: subclasses, timm's layers, parametrised and pruned ones."""

import copy
import io
import pickle

import pytest
import torch
from snapshot import snapshot
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.utils import parametrize, prune

import syncbn


class Named(nn.BatchNorm2d):
    """A subclass that adds methods and leaves forward alone."""

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)

    def gain(self):
        return self.weight.mean().item()


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def _round_trip(layer):
    before = snapshot(layer)
    syncbn.convert_sync_batchnorm(layer, strict=True)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    syncbn.revert_sync_batchnorm(layer)
    assert snapshot(layer) == before


def test_a_subclass_that_keeps_torchs_forward_keeps_its_class_and_methods():
    layer = Named(3)
    _round_trip(layer)
    syncbn.convert_sync_batchnorm(layer)
    assert isinstance(layer, Named)
    assert layer.gain() == 0.5
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(4, 3))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), Named(3)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(3), lambda: Named(3), lambda: BatchNormAct2d(3)]
)
def test_converted_layers_pickle_and_copy_and_can_still_be_reverted(make):
    layer = syncbn.convert_sync_batchnorm(make(), process_group="node")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        copy.deepcopy(layer),
        copy.copy(layer),
    ]
    for twin in copies:
        assert type(twin) is type(layer)
        assert twin.process_group == "node"
        torch.testing.assert_close(twin.state_dict(), layer.state_dict())
        assert type(syncbn.revert_sync_batchnorm(twin)) is type(make())


def test_an_attribute_act_of_the_users_does_not_become_an_activation():
    layer = nn.BatchNorm2d(3)
    layer.act = "relu"
    syncbn.convert_sync_batchnorm(layer)
    assert (layer(torch.randn(4, 3, 2, 2)) < 0).any()
    assert syncbn.revert_sync_batchnorm(layer).act == "relu"


def _with_act(drop=False, **options):
    torch.manual_seed(0)
    layer = BatchNormAct2d(3, **options)
    if drop:
        layer.drop = nn.Dropout2d(0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3))
        layer.bias.copy_(torch.randn(3))
    return layer


@pytest.mark.parametrize(
    "options",
    [{}, {"act_layer": nn.SiLU}, {"apply_act": False}, {"momentum": None}, {"drop": True}],
    ids=str,
)
def test_timms_norm_with_activation_computes_what_it_did(options):
    layer, twin = _with_act(**options), syncbn.convert_sync_batchnorm(_with_act(**options))
    x = torch.randn(4, 3, 5, 5)
    for mode in (True, True, False):
        results = []
        for one in (layer, twin):
            torch.manual_seed(1)
            own = x.clone().requires_grad_()
            y = one.train(mode)(own)
            y.backward(x.sin())
            results.append((y, own.grad, one.running_mean, one.running_var, one.weight.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_timms_norm_with_activation_keeps_its_submodules_in_reach():
    layer = BatchNormAct2d(3, act_layer=nn.PReLU)
    model = syncbn.convert_sync_batchnorm(nn.Sequential(layer))
    assert isinstance(layer.act, nn.PReLU)
    assert model.get_submodule("0.act") is layer.act
    assert model.get_parameter("0.act.weight") is layer.act.weight
    seen = []
    layer.act.register_forward_hook(lambda *_: seen.append("act"))
    layer(torch.randn(2, 3, 4, 4))
    assert seen == ["act"]
    assert "act=" not in repr(layer).splitlines()[0]


@pytest.mark.parametrize("drop", [False, True])
def test_timms_layers_come_back(drop):
    _round_trip(_with_act(drop))
    layer = SyncBatchNormAct(3)
    layer.drop, layer.act = nn.Identity(), nn.ReLU()
    _round_trip(layer)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Named, BatchNormAct2d])
def test_a_parametrised_layer_keeps_its_parametrisation_both_ways(kind):
    layer = parametrize.register_parametrization(kind(3), "weight", Double())
    _round_trip(layer)
    syncbn.convert_sync_batchnorm(layer)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.fill_(3)
    assert torch.equal(layer.weight, torch.full((3,), 6.0))
    layer(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert original.grad is not None
    layer.weight = torch.ones(3)
    assert torch.equal(original, torch.full((3,), 0.5))
    syncbn.revert_sync_batchnorm(layer)
    assert torch.equal(layer.weight, torch.ones(3))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is kind


def test_parametrising_or_not_between_converting_and_reverting_does_not_matter():
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    parametrize.register_parametrization(layer, "weight", Double())
    assert isinstance(copy.deepcopy(layer), syncbn.SyncBatchNorm)
    syncbn.revert_sync_batchnorm(layer)
    assert isinstance(layer, nn.BatchNorm2d)
    assert parametrize.is_parametrized(layer, "weight")
    assert isinstance(copy.deepcopy(layer), nn.BatchNorm2d)
    syncbn.convert_sync_batchnorm(layer)
    parametrize.register_parametrization(layer, "bias", Double())
    parametrize.remove_parametrizations(layer, "weight")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is syncbn.SyncBatchNorm
    assert type(syncbn.revert_sync_batchnorm(layer)) is nn.BatchNorm2d


def test_pruning_survives():
    layer = nn.BatchNorm1d(8)
    prune.l1_unstructured(layer, "weight", 0.5)
    _round_trip(layer)
    syncbn.convert_sync_batchnorm(layer)(torch.randn(4, 8))
    assert int((layer.weight == 0).sum()) == 4


def test_a_class_changed_since_the_conversion_is_not_lost_by_reverting():
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    layer.__class__ = type("Wrapped", (syncbn.SyncBatchNorm,), {})
    with pytest.raises(ValueError, match="the module became a Wrapped after it was converted"):
        syncbn.revert_sync_batchnorm(layer)


def test_a_lazy_layer_changes_nothing_of_the_others():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="1 is lazy"):
        syncbn.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
