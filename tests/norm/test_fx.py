"""What traces models takes the layer as it takes torch's: torch.fx as one `call_module` node, make_fx as operators."""

import copy

import pytest
import timm
import torch
import torchvision
from oracle import assert_close, own_part
from timm.layers import BatchNormAct2d
from timm.models import FeatureGraphNet
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
from torch.autograd import forward_ad
from torch.fx.experimental.optimization import fuse
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import syncbn

training_and_evaluation = pytest.mark.parametrize("training", [True, False])


class Block(nn.Module):
    """Masked and fused operands, a shared layer, and a layer behind a submodule."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = syncbn.SyncBatchNorm(4, act="relu")
        self.down = nn.Sequential(nn.Conv2d(3, 4, 1), syncbn.SyncBatchNorm(4))

    def forward(self, x, mask):
        y = self.norm(self.conv(x), mask=mask, residual=self.down(x))
        return self.norm(y, mask)


class Halved(syncbn.SyncBatchNorm):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input) / 2


def _model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )


def _pair(training):
    """The same model with torch's synchronised layers and with ours."""
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(_model()).train(training)
    return theirs, syncbn.convert_sync_batchnorm(_model()).train(training)


def _nodes(graph_module):
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes]


@training_and_evaluation
def test_the_graph_is_that_of_torchs_layer(training):
    theirs, ours = _pair(training)
    assert _nodes(fx.symbolic_trace(ours)) == _nodes(fx.symbolic_trace(theirs))


@training_and_evaluation
@pytest.mark.parametrize(
    "make",
    [_model, torchvision.models.resnet18, lambda: timm.create_model("mobilenetv3_small_050")],
    ids=["sequence", "torchvision", "timm"],
)
def test_a_traced_model_computes_what_the_model_does(training, make):
    model = syncbn.convert_sync_batchnorm(make()).train(training)
    for part in model.modules():
        if isinstance(part, nn.Dropout | timm.layers.DropPath):
            part.eval()
    twin = copy.deepcopy(model)
    traced = fx.symbolic_trace(model)
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = twin(x)
    torch.manual_seed(1)
    assert torch.equal(traced(x), expected)
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@training_and_evaluation
def test_masks_residuals_activations_and_shared_layers_are_traced(training):
    block = Block().train(training)
    traced = fx.symbolic_trace(block)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["conv", "down.0", "down.1", "norm", "norm"]
    x, mask = torch.randn(2, 3, 5, 5), torch.rand(2, 1, 5, 5) > 0.3
    assert torch.equal(traced(x, mask), copy.deepcopy(block)(x, mask))


@pytest.mark.parametrize(
    "layer",
    [lambda: Halved(4), lambda: syncbn.convert_sync_batchnorm(BatchNormAct2d(4))],
    ids=["subclass", "timm"],
)
def test_a_layer_with_a_forward_of_its_own_is_one_node_too(layer):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer())
    traced = fx.symbolic_trace(model)
    assert [n for n in _nodes(traced) if n[0] == "call_module"] == [
        ("call_module", "0"),
        ("call_module", "1"),
    ]
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(traced(x), model(x))


def test_hooks_run_when_the_traced_model_runs_and_not_while_it_is_traced():
    model, seen = syncbn.convert_sync_batchnorm(_model()), []
    model[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[1].register_forward_hook(lambda *_: seen.append("after"))
    traced = fx.symbolic_trace(model)
    assert seen == []
    traced(torch.randn(2, 3, 5, 5))
    assert seen == ["before", "after"]


def test_a_traced_layer_follows_the_mode_of_the_traced_model():
    model = syncbn.convert_sync_batchnorm(_model())
    traced = fx.symbolic_trace(model)
    traced.eval()(torch.randn(2, 3, 5, 5))
    assert model[1].num_batches_tracked == 0
    traced.train()(torch.randn(2, 3, 5, 5))
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, syncbn.SyncBatchNorm])
def test_a_layer_that_is_itself_the_root_cannot_be_traced(kind):
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(kind(4))


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, syncbn.SyncBatchNorm])
def test_a_layer_outside_the_model_cannot_be_traced(kind):
    layer = kind(4)

    class Outside(nn.Module):
        def forward(self, x):
            return layer(x)

    with pytest.raises(NameError, match="not installed as a submodule"):
        fx.symbolic_trace(Outside())


@training_and_evaluation
def test_torchvision_extracts_the_features_of_a_converted_model(training):
    plain = torchvision.models.resnet18()
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain)).train(training)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert get_graph_node_names(model) == get_graph_node_names(theirs)
    twin, features, x = copy.deepcopy(model), {}, torch.randn(2, 3, 64, 64)
    twin.layer2.register_forward_hook(lambda module, args, y: features.update(layer2=y))
    twin(x)
    extracted = create_feature_extractor(model, ["layer2", "layer1.0.bn1"])(x)
    assert torch.equal(extracted["layer2"], features["layer2"])
    assert extracted["layer1.0.bn1"].shape == (2, 64, 16, 16)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_timm_extracts_the_features_of_a_converted_model(name):
    model = syncbn.convert_sync_batchnorm(timm.create_model(name)).eval()
    x, expected = torch.randn(2, 3, 64, 64), []
    for info in model.feature_info[1:3]:
        part = model.get_submodule(info["module"])
        part.register_forward_hook(lambda module, args, y: expected.append(y))
    model(x)
    features = FeatureGraphNet(copy.deepcopy(model), out_indices=(1, 2))(x)
    assert all(torch.equal(a, b) for a, b in zip(features, expected[:2], strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prepare", [prepare_qat_fx, prepare_fx])
def test_quantisation_prepares_a_model_as_with_torchs_layer(prepare):
    theirs, ours = _pair(training=prepare is prepare_qat_fx)
    x = torch.randn(2, 3, 5, 5)
    mapping = get_default_qat_qconfig_mapping("x86")
    expected, prepared = (prepare(model, mapping, (x,)) for model in (theirs, ours))
    assert _nodes(prepared) == _nodes(expected)
    prepared(x).square().sum().backward()
    assert prepared.get_submodule("1").num_batches_tracked == (prepare is prepare_qat_fx)
    assert convert_fx(prepared.eval())(x).shape == (2, 4, 3, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pass_", [fuse, fuse_fx])
def test_passes_that_fuse_convolution_and_batch_norm_do_what_they_do_with_torchs_layer(pass_):
    theirs, ours = _pair(training=False)
    assert _nodes(pass_(ours)) == _nodes(pass_(theirs))


@pytest.mark.world_size(2)
def test_a_traced_model_is_synchronised(world_size):
    oracle = _model().double()
    traced = fx.symbolic_trace(syncbn.convert_sync_batchnorm(copy.deepcopy(oracle)))
    whole = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    assert_close(traced(own_part(whole, (2, 4))), own_part(oracle(whole), (2, 4)), 1e-10)


SIZES = pytest.mark.parametrize("size", [2, 2**16], ids=["small", "large"])


@SIZES
def test_forward_mode_derivatives_are_those_of_torch_whatever_the_size(size):
    ours, theirs = syncbn.SyncBatchNorm(3), nn.BatchNorm2d(3)
    x, tangent = torch.randn(2, 4, 3, size, 2)
    with forward_ad.dual_level():
        duals = [
            forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
            for layer in (ours, theirs)
        ]
    assert_close(duals[0].tangent, duals[1].tangent, 1e-5)


@SIZES
@pytest.mark.parametrize("call", ["layer", "fused", "masked", "function"])
def test_what_make_fx_traces_gives_the_numbers_of_other_inputs(size, call):
    layer = syncbn.SyncBatchNorm(
        3, act="relu" if call == "fused" else None, track_running_stats=False
    )
    mask = torch.arange(4 * size).view(4, 1, size) % 3 > 0

    def run(x):
        if call == "function":
            return syncbn.sync_batch_norm(x, weight=layer.weight, act="relu")
        return layer(x, mask if call == "masked" else None)

    x, other = torch.randn(2, 4, 3, size)
    assert_close(make_fx(run)(x)(other), run(other), 1e-5)
