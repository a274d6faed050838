"""Models of torchvision and timm come back from a conversion object for object, with nothing left out."""

import pytest
import timm
import torch
import torchvision
from snapshot import snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

pytestmark = pytest.mark.untraced
TORCHVISION = [
    name
    for name in torchvision.models.list_models()
    if not name.startswith("regnet_")  # they cannot be built without memory
]
_FAMILIES = {
    torchvision.models.get_model_builder(name).__module__: name for name in reversed(TORCHVISION)
}
TORCHVISION_SAMPLE = sorted({*_FAMILIES.values(), "resnet50", "fcn_resnet50", "vit_b_16"})
"""A model of every module of torchvision's."""
DEEP = ("rcnn", "fcos", "retina", "ssd", "deeplab", "lraspp", "fcn")
TIMM_FAMILIES = [module for module in timm.models.list_modules() if timm.list_models(module=module)]
TIMM_SAMPLE = """
bat_resnext26ts botnet26t_256 convmixer_768_32
cs3darknet_focus_m densenet121 dla34 dpn68b efficientformer_l1
efficientnet_b0 efficientvit_b0 efficientvit_m0 fastvit_t8
ghostnet_050 hardcorenas_a hgnet_tiny hrnet_w18_small inception_v3
inception_v4 levit_128s coatnet_nano_rw_224 mobilenetv3_small_050
mobilevit_xxs nasnetalarge nextvit_small pnasnet5large regnetx_002
repghostnet_050 repvit_m1 res2net50_14w_8s resnest14d resnet18
resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1
skresnet18 starnet_s1 swiftformer_xs tiny_vit_5m_224 tresnet_m
vgg11_bn visformer_tiny legacy_xception xception41
""".split()  # noqa: SIM905 - a list of names to read, not of strings


def _torchvision(name, **options):
    deep = {"weights_backbone": None} if any(part in name for part in DEEP) else {}
    return torchvision.models.get_model(name, weights=None, **deep, **options)


def _check_round_trip(model):
    """Convert, see that every batch norm is synchronised, revert, and compare; the number of norm layers."""
    before, keys = snapshot(model), list(model.state_dict())
    rows = []
    syncbn.convert_sync_batchnorm(model, report=rows.append)
    assert not [row for row in rows if row.left_alone]
    assert list(model.state_dict()) == keys
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(norm, syncbn.SyncBatchNorm) for norm in norms)
    assert len(norms) == len(rows)
    syncbn.revert_sync_batchnorm(model)
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    return len(norms)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("names", "at_least"),
    [(TORCHVISION_SAMPLE, 20), pytest.param(TORCHVISION, 90, marks=pytest.mark.slow)],
    ids=["families", "all"],
)
def test_torchvision_models_come_back(names, at_least):
    with torch.device("meta"):  # no memory, no initialisation: the objects are what counts
        counts = {name: _check_round_trip(_torchvision(name)) for name in names}
    assert len(counts) > at_least
    assert counts["resnet50"] == counts["fcn_resnet50"] - 1 == 53
    assert counts["vit_b_16"] == 0


@pytest.mark.parametrize(
    "name", ["regnet_y_400mf", pytest.param("regnet_x_8gf", marks=pytest.mark.slow)]
)
def test_regnets_come_back_with_their_values(name):
    model = _torchvision(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert _check_round_trip(model) > 50
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_every_timm_family_with_batch_norm_comes_back():
    with torch.device("meta"):
        counts = {name: _check_round_trip(timm.create_model(name)) for name in TIMM_SAMPLE}
    assert all(counts.values()), [name for name, count in counts.items() if not count]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TIMM_FAMILIES)
def test_every_timm_model_comes_back(family):
    with torch.device("meta"):
        for name in timm.list_models(module=family):
            _check_round_trip(timm.create_model(name))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_converted_model_computes_the_same_in_one_process(name):
    model = _torchvision(name, num_classes=5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = _outputs(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    _reset(model)
    actual = _outputs(syncbn.convert_sync_batchnorm(model), x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.state_dict(), state, rtol=1e-8, atol=1e-8)


def _outputs(model, x):
    """What it gives in training, and then in evaluation; dropout draws the same."""
    torch.manual_seed(0)
    return model.train()(x).detach(), model.eval()(x).detach()


def _reset(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "repghostnet_050", "selecsls42"])
def test_a_converted_timm_model_computes_the_same_in_one_process(name):
    model = timm.create_model(name, num_classes=5).double()  # rounding grows with depth
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = _outputs(model, x)
    _reset(model)
    actual = _outputs(syncbn.convert_sync_batchnorm(model), x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
