"""Probes that look at what goes through layers: quantiles, shift, saturation, gradients."""

import math

import pytest
import torch
from probe_kit import Block, Net, batch, column, linear, split, view_of
from torch import nn

from syncbn.config import ModelConfig, ProbeConfig, RunConfig
from syncbn.errors import UsageError
from syncbn.models import build_model
from syncbn.probes import PROBES
from syncbn.probes.aside import own_statistics
from syncbn.probes.layers import layers_of
from syncbn.probes.shift import slope
from syncbn.virtual import Ranks, VirtualBatchNorm

RAMP = column(*range(21))
"""Of w times these, the 15th, 50th and 85th percentile are 3, 10 and 17 w."""


def _set(layer: nn.Linear, weight: float = 1.0, bias: float = 0.0) -> None:
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.bias.fill_(bias)


def test_quantiles_are_those_of_what_enters_the_last_activation():
    net = Net(Block(nn.Linear(1, 2), nn.ReLU()), width=2)
    view = view_of(net, split(RAMP))
    probe = PROBES["quantiles"](view)
    _set(net.hidden[0].affine)
    expected = {"quantile/15": 3, "quantile/50": 10, "quantile/85": 17}
    assert probe.look(view) == pytest.approx(expected)
    _set(net.hidden[0].affine, weight=2.0)
    probe.look(view)
    # each percentile moved by 3, 10, 17; the spread was 14, then 28
    assert probe.conclude(view)["quantile_range_unit0"] == pytest.approx(10 / 21)


def test_the_range_of_quantiles_is_the_median_over_units_and_starts_at_probe_first():
    net = Net(Block(nn.Linear(1, 3), nn.ReLU()), width=3)
    cfg = RunConfig(probe=ProbeConfig(first=5))
    probe = PROBES["quantiles"](view_of(net, split(RAMP), cfg=cfg))
    layer = net.hidden[0].affine
    for step, shifts in ((0, [90.0, 90, 90]), (5, [0.0, 0, 0]), (10, [1.0, 14, 28])):
        _set(layer)
        with torch.no_grad():
            layer.bias.copy_(torch.tensor(shifts))
        probe.look(view_of(net, split(RAMP), cfg=cfg, step=step))
    finals = probe.conclude(view_of(net, split(RAMP), cfg=cfg))
    assert finals["quantile_range"] == pytest.approx(14 / 14)
    assert finals["quantile_range_unit0"] == pytest.approx(1 / 14)


def test_units_of_a_convolution_are_looked_at_in_the_centre_of_the_image():
    net = build_model(ModelConfig(name="cnn", width=2), (1, 8, 8), 2, seed=0)
    images = torch.zeros(21, 1, 8, 8, dtype=torch.float64)
    view = view_of(net, split(images), cfg=RunConfig(model=ModelConfig(name="cnn")))
    blind = net.hidden[-1].activation
    blind.register_forward_pre_hook(lambda _, args: (args[0] * 0 + RAMP.view(-1, 1, 1, 1),))
    assert PROBES["quantiles"](view).look(view)["quantile/50"] == pytest.approx(10)


def test_without_a_look_that_counts_there_is_no_range():
    net = Net(Block(nn.Linear(1, 1), nn.ReLU()))
    view = view_of(net, split(RAMP), cfg=RunConfig(probe=ProbeConfig(first=5)))
    probe = PROBES["quantiles"](view)
    probe.look(view)
    assert math.isnan(probe.conclude(view)["quantile_range"])


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(1), VirtualBatchNorm(1, Ranks(7))], ids=["one batch", "seven ranks"]
)
def test_batch_norms_normalise_probe_images_as_one_group_and_keep_their_buffers(norm):
    norm.running_mean.fill_(100.0)
    norm.momentum = 0.5
    net = Net(Block(linear([[1.0]], [0.0]), nn.ReLU(), norm))
    view = view_of(net, split(RAMP))
    found = PROBES["quantiles"](view).look(view)
    sd = math.sqrt(110 / 3)  # of 0..20
    expected = {"quantile/15": -7 / sd, "quantile/50": 0, "quantile/85": 7 / sd}
    assert found == pytest.approx(expected, abs=1e-5)
    assert norm.running_mean == 100
    assert norm.training
    assert "forward" not in norm.__dict__


def test_a_network_is_whole_again_when_a_pass_aside_fails():
    net = Net(Block(nn.Linear(1, 1), nn.ReLU(), nn.BatchNorm1d(1)))
    with pytest.raises(RuntimeError), own_statistics(net):
        net(torch.zeros(3, 7))
    assert net.hidden[0].norm.training
    assert "forward" not in net.hidden[0].norm.__dict__


def test_shift_is_the_distance_of_means_in_standard_deviations():
    net = Net(
        Block(linear([[1.0]], [0.0]), nn.ReLU()),
        Block(linear([[2.0], [1.0]], [0.0, 0.0]), nn.ReLU()),
        width=2,
    )
    view = view_of(net, split(RAMP))
    probe = PROBES["shift"](view)
    assert probe.look(view) == {}  # nothing to compare with
    with torch.no_grad():
        net.hidden[0].affine.bias.fill_(3.0)
    found = probe.look(view)
    sd = math.sqrt(110 / 3)
    # layer 3 takes two units, moved by 6 and 3, whose variances are 4 and 1 times that of the ramp
    third = math.sqrt((36 + 9) / 2) / math.sqrt((4 + 1) / 2 * 110 / 3)
    assert found == pytest.approx({"shift/2": 3 / sd, "shift/3": third})
    expected = math.log(third) - math.log(3 / sd)
    assert probe.conclude(view)["shift_slope"] == pytest.approx(expected, abs=1e-12)


def test_a_layer_whose_input_is_the_same_for_all_images_has_no_shift():
    net = Net(Block(linear([[0.0]], [1.0]), nn.ReLU()))
    view = view_of(net, split(RAMP))
    probe = PROBES["shift"](view)
    assert probe.look(view) == probe.look(view) == {}
    assert math.isnan(probe.conclude(view)["shift_slope"])


def test_the_slope_is_that_of_the_least_squares_line():
    assert slope({2: 1.0, 3: 2.0, 4: 6.0}) == pytest.approx(2.5)
    assert math.isnan(slope({2: 1.0}))


@pytest.mark.parametrize(
    ("activation", "weights", "expected"),
    [
        (nn.Sigmoid(), [[3.0]], 4 / 6),  # .05 is sigmoid(-2.94)
        (nn.Tanh(), [[1.0]], 2 / 6),  # .9 is tanh(1.47)
        (nn.ReLU(), [[1.0]], 0.0),
    ],
)
def test_saturated_outputs_are_counted_by_the_activation(activation, weights, expected):
    net = Net(Block(linear(weights, [0.0]), activation))
    cfg = RunConfig(model=ModelConfig(activation=type(activation).__name__.lower()))
    view = view_of(net, split(column(-2, -1, -0.5, 0.5, 1, 2)), cfg=cfg)
    assert PROBES["saturation"](view).look(view) == {"saturation/1": pytest.approx(expected)}


def test_relu_units_are_saturated_that_no_image_wakes():
    net = Net(Block(linear([[1.0], [1.0], [1.0], [1.0]], [0.0, -5, -9, -99]), nn.ReLU()), width=4)
    view = view_of(net, split(column(0, 6)))
    assert PROBES["saturation"](view).look(view) == {"saturation/1": 0.5}


def test_gradients_are_measured_layer_by_layer():
    net = Net(Block(linear([[1.0], [1.0]], [0.0, 0.0]), nn.ReLU()), width=2)
    images = column(1, 2)
    view = view_of(net, split(images), batch=batch(images, torch.tensor([0, 1])))
    net.hidden[0].affine.weight.grad = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    net.output.weight.grad = torch.full((2, 2), 2.0, dtype=torch.float64)
    probe = PROBES["gradients"](view)
    assert probe.look(view) == {"grad_norm/1": 5.0, "grad_norm/2": 4.0}
    assert probe.look(view_of(net, split(images))) == {}  # the last look has no batch


def test_layers_of_other_networks_are_counted_in_order():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert [(layer.number, layer.affine) for layer in layers_of(net)] == [(1, net[0]), (2, net[3])]


@pytest.mark.parametrize("name", ["quantiles", "saturation"])
def test_probes_of_activations_refuse_networks_in_which_they_cannot_tell_them(name):
    with pytest.raises(UsageError, match=f"probe {name} cannot look into model=mlp: use mlp"):
        PROBES[name](view_of(nn.Linear(1, 2), split(RAMP)))


def test_saturation_refuses_an_activation_that_does_not_saturate():
    cfg = RunConfig(model=ModelConfig(activation="silu"))
    with pytest.raises(UsageError, match="activation=silu is not allowed: one of sigmoid, tanh"):
        PROBES["saturation"](view_of(Net(Block(nn.Linear(1, 1), nn.SiLU())), split(RAMP), cfg=cfg))
