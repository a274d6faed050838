"""Models: shapes, gradients, placement of norms, and weights that the seed alone decides."""

import pytest
import torch
from torch import nn

from syncbn.config import ModelConfig
from syncbn.errors import UsageError
from syncbn.models import build_model, local_response_norm

SHAPES = [(1, 8, 8), (3, 11, 9), (2, 1, 1)]


def check_logits_and_gradients(cfg: ModelConfig, shape) -> None:
    model = build_model(cfg, shape, num_classes=3, seed=0)
    logits = model(torch.rand(6, *shape))
    assert logits.shape == (6, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("placement", ["pre", "post", "input"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg"])
def test_logits_and_gradients_of_every_model(name, shape, placement):
    check_logits_and_gradients(
        ModelConfig(name=name, hidden=[7, 5], width=4, placement=placement), shape
    )


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "silu"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg"])
def test_logits_and_gradients_of_every_activation(name, activation):
    cfg = ModelConfig(name=name, hidden=[7, 5], width=4, activation=activation)
    check_logits_and_gradients(cfg, (1, 8, 8))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg"])
def test_models_run_in_float64(name):
    model = build_model(ModelConfig(name=name, width=4), (1, 8, 8), 10, seed=0).double()
    assert model(torch.rand(4, 1, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("placement", "order"),
    [
        ("pre", ["Linear", "BatchNorm1d", "Sigmoid"]),
        ("post", ["Linear", "Sigmoid", "BatchNorm1d"]),
        ("input", ["BatchNorm1d", "Linear", "Sigmoid"]),
    ],
)
def test_the_norm_stands_where_placement_says(placement, order):
    cfg = ModelConfig(hidden=[6, 5, 4], activation="sigmoid", placement=placement)
    model = build_model(cfg, (1, 2, 4), 10, seed=0)
    kinds = [type(m).__name__ for m in model.modules() if not list(m.children())]
    assert kinds == order * 3 + ["Linear"]
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms == ([8, 6, 5] if placement == "input" else [6, 5, 4])


@pytest.mark.parametrize(
    ("placement", "order"),
    [
        ("pre", ["affine", "norm", "activation", "lrn", "dropout"]),
        ("post", ["affine", "activation", "lrn", "dropout", "norm"]),
        ("input", ["norm", "affine", "activation", "lrn", "dropout"]),
    ],
)
@pytest.mark.parametrize(("name", "num_layers"), [("cnn", 3), ("vgg", 6)])
def test_lrn_and_dropout_follow_every_hidden_activation(name, num_layers, placement, order):
    cfg = ModelConfig(name=name, width=4, placement=placement, lrn=True, dropout=0.5)
    check_logits_and_gradients(cfg, (1, 8, 8))
    layers = [
        m for m in build_model(cfg, (1, 8, 8), 10, seed=0).hidden if isinstance(m, nn.Sequential)
    ]
    assert [[part for part, _ in layer.named_children()] for layer in layers] == [
        order
    ] * num_layers


def test_dropout_drops_hidden_activations_in_training_only():
    cfg = ModelConfig(hidden=[400, 400], dropout=0.25)
    model = build_model(cfg, (1, 8, 8), 10, seed=0)
    for layer in model.hidden:
        drop = layer.dropout
        dropped = (drop(torch.ones(100, 100)) == 0).double().mean().item()
        assert dropped == pytest.approx(0.25, abs=0.02)
    x = torch.rand(4, 1, 8, 8)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_local_response_norm_is_the_formula_of_alexnet():
    x = torch.rand(2, 9, 3, 3, dtype=torch.float64) * 300
    energies = [x[:, max(i - 2, 0) : i + 3].square().sum(1) for i in range(9)]
    expected = x / (2 + 1e-4 * torch.stack(energies, 1)) ** 0.75
    torch.testing.assert_close(local_response_norm()(x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["cnn", "vgg"])
def test_neither_dropout_nor_lrn_changes_the_weights_a_model_starts_from(name):
    plain, other = (
        build_model(ModelConfig(name=name, width=4, **options), (1, 8, 8), 10, seed=0)
        for options in ({}, {"dropout": 0.5, "lrn": True})
    )
    assert list(plain.state_dict()) == list(other.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_biases_are_kept_before_a_norm():
    for name in ("mlp", "cnn", "vgg"):
        model = build_model(ModelConfig(name=name, width=4), (1, 8, 8), 10, seed=0)
        affine = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert all(m.bias is not None for m in affine)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg"])
def test_the_seed_alone_decides_the_weights(name):
    cfg = ModelConfig(name=name, width=4)

    def weights(seed):
        return nn.utils.parameters_to_vector(build_model(cfg, (1, 8, 8), 10, seed).parameters())

    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


def test_normal_init_has_its_std_and_no_bias():
    cfg = ModelConfig(hidden=[200, 200], init="normal", init_std=0.3)
    model = build_model(cfg, (1, 8, 8), 10, seed=0)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.3, rel=0.1)
        assert layer.bias.abs().max() == 0


def test_a_torchvision_model_by_name():
    model = build_model(ModelConfig(name="torchvision", arch="resnet18"), (3, 32, 32), 7, seed=0)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_an_unknown_architecture_lists_the_nearest_ones():
    with pytest.raises(UsageError, match=r"model\.arch=resnet19 .*did you mean resnet18") as e:
        build_model(ModelConfig(name="torchvision", arch="resnet19"), (3, 32, 32), 10, seed=0)
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match=r"model\.arch=qqq .*for example alexnet"):
        build_model(ModelConfig(name="torchvision", arch="qqq"), (3, 32, 32), 10, seed=0)


def test_a_segmentation_model_is_not_a_classification_model():
    with pytest.raises(UsageError, match="not a torchvision classification model"):
        build_model(ModelConfig(name="torchvision", arch="fcn_resnet50"), (3, 32, 32), 10, seed=0)


def test_grey_images_are_refused_where_three_channels_are_due():
    with pytest.raises(UsageError, match="takes images of 3 channels, these have 1"):
        build_model(ModelConfig(name="torchvision", arch="resnet18"), (1, 28, 28), 10, seed=0)
