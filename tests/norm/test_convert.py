"""Conversion keeps everything but the class, and can be undone."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import syncbn


def _model():
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        shared,
        nn.Sequential(shared, nn.BatchNorm2d(4, momentum=None, affine=False)),
    )


def _fingerprint(model):
    return {
        name: (type(module), module.training, id(module)) for name, module in model.named_modules()
    }


@pytest.mark.parametrize("make", [_model, torchvision.models.resnet18, lambda: nn.BatchNorm1d(3)])
def test_reverting_gives_back_the_same_model(make):
    model = make().eval()
    before, state = _fingerprint(model), copy.deepcopy(model.state_dict())
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    assert syncbn.convert_sync_batchnorm(model) is model
    assert any(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert syncbn.revert_sync_batchnorm(model) is model
    assert _fingerprint(model) == before
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_hooks_attributes_buffers_flags_and_sharing_survive():
    model = _model()
    layer = model[1]
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    layer.note = "mine"
    layer.register_buffer("extra", torch.ones(2))
    layer.weight.requires_grad_(False)
    layer.eval().double()
    syncbn.convert_sync_batchnorm(model)
    assert model[1] is layer
    assert model[2][0] is layer
    assert layer.note == "mine"
    assert "1.extra" in model.state_dict()
    assert not layer.weight.requires_grad
    assert not layer.training
    assert layer.weight.dtype == torch.float64
    layer(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert seen == ["hook"]


def test_converting_again_changes_the_group_alone():
    model = syncbn.convert_sync_batchnorm(_model())
    syncbn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=2)
    assert model[1].process_group == 2
    assert type(syncbn.revert_sync_batchnorm(model)[1]) is nn.BatchNorm2d


def test_a_converted_layer_takes_the_dimensions_its_class_took():
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(3, 3, 8))


def test_a_group_given_by_hand_survives_converting_the_model_around_it():
    model = nn.Sequential(syncbn.SyncBatchNorm(3, process_group="node"), nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model)
    assert model[0].process_group == "node"


def test_an_attribute_of_the_same_name_comes_back():
    layer = nn.BatchNorm1d(3)
    layer.layer_name = "mine"
    syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(layer))
    assert layer.layer_name == "mine"


def test_a_layer_made_as_sync_stays_sync():
    layer = syncbn.SyncBatchNorm(3)
    assert type(syncbn.revert_sync_batchnorm(layer)) is syncbn.SyncBatchNorm


def test_layers_know_their_names():
    model = syncbn.convert_sync_batchnorm(torchvision.models.resnet18())
    assert model.layer3[0].bn1.layer_name == "layer3.0.bn1"


def test_lazy_layers_want_a_batch_first():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="0 is lazy: run one batch first"):
        syncbn.convert_sync_batchnorm(model)
    model(torch.randn(2, 3, 4, 4))
    assert isinstance(syncbn.convert_sync_batchnorm(model)[0], syncbn.SyncBatchNorm)


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        syncbn.convert_sync_batchnorm("model")
    with pytest.raises(ValueError, match="process_group='x'"):
        syncbn.convert_sync_batchnorm(nn.BatchNorm1d(2), "x")
