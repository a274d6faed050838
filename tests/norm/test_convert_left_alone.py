"""Norm layers that a conversion leaves alone: each with its reason, those that look at the batch with a warning."""

import re
import warnings

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SplitBatchNorm2d, SyncBatchNormAct
from torch import nn

import syncbn


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class FrozenShifted(Shifted):
    """A class with fixed statistics that derives from torch's."""


class Own(nn.Module):
    """Keeps running statistics without being one of torch's norms."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))


def _replaced():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


def _hidden():
    layer = nn.BatchNorm2d(3)
    layer.act = nn.ReLU()
    return layer


LOCAL = [
    (lambda: Shifted(3), "Shifted has a forward of its own"),
    (lambda: SplitBatchNorm2d(3), "SplitBatchNorm2d has a forward of its own"),
    (_replaced, "its forward was replaced"),
    (_hidden, "its 'act' would be hidden by SyncBatchNorm's own"),
    (lambda: SyncBatchNormAct(3), "without its submodules drop and act"),
    (Own, "Own keeps running statistics in a class of its own"),
    (lambda: torch.jit.script(nn.BatchNorm2d(3)), "BatchNorm2d is compiled by torch.jit"),
]
"""Layers that normalise with the batch of their rank, and why they are left alone."""
FIXED = [
    lambda: torchvision.ops.FrozenBatchNorm2d(3),
    lambda: FrozenBatchNormAct2d(3),
    lambda: FrozenShifted(3),
    lambda: torch.jit.script(torchvision.ops.FrozenBatchNorm2d(3)),
]
"""Layers with fixed statistics."""
OTHERS = [
    lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    lambda: nn.LazyInstanceNorm2d(track_running_stats=True),
    lambda: nn.GroupNorm(1, 3),
    lambda: nn.LayerNorm(3),
    lambda: nn.Linear(2, 2),
]

local = pytest.mark.parametrize(("make", "reason"), LOCAL, ids=[reason for _, reason in LOCAL])
fixed = pytest.mark.parametrize("make", FIXED)


def _convert_silently(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return syncbn.convert_sync_batchnorm(model, **options)


@local
def test_a_layer_that_looks_at_the_batch_is_named_in_a_warning_with_its_reason(make, reason):
    model, rows = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"inner": make()})), []
    layer, cls = model[1]["inner"], type(model[1]["inner"])
    with pytest.warns(UserWarning, match=rf"'1\.inner' \({cls.__name__}\): .*{reason}") as said:
        syncbn.convert_sync_batchnorm(model, report=rows.append)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert type(layer) is cls
    assert isinstance(model[0], syncbn.SyncBatchNorm)
    row = next(row for row in rows if row.name == "1.inner")
    assert row.local
    assert reason in row.left_alone


@local
def test_strict_refuses_it_and_changes_nothing(make, reason):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"inner": make()}))
    with pytest.raises(ValueError, match=rf"strict=True, but .*'1\.inner' \(\w+\): .*{reason}"):
        syncbn.convert_sync_batchnorm(model, strict=True)
    assert type(model[0]) is nn.BatchNorm2d


@fixed
def test_a_layer_with_fixed_statistics_is_reported_and_nothing_to_warn_of(make):
    model, rows = nn.Sequential(nn.BatchNorm2d(3), make()), []
    cls = type(model[1])
    _convert_silently(model, strict=True, report=rows.append)
    assert type(model[1]) is cls
    assert isinstance(model[0], syncbn.SyncBatchNorm)
    assert [(row.name, row.local) for row in rows] == [("0", False), ("1", False)]
    assert rows[0].left_alone is None
    assert "fixed statistics: nothing to synchronise" in rows[1].left_alone


@pytest.mark.parametrize("make", OTHERS)
def test_other_layers_are_no_part_of_a_conversion(make):
    model, rows = nn.Sequential(nn.BatchNorm2d(3), make()), []
    _convert_silently(model, strict=True, report=rows.append)
    assert [row.name for row in rows] == ["0"]


def test_a_warning_lists_each_class_and_reason_once_with_all_its_layers():
    model = nn.Sequential(Shifted(3), Own(), Shifted(3), torchvision.ops.FrozenBatchNorm2d(3))
    expected = (
        "norm layers left alone, which normalise with the batch of one rank: '0', '2' (Shifted): Shifted has a "
        "forward of its own, whose behaviour a conversion could change; '1' (Own): Own keeps running statistics "
        "in a class of its own"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(expected)}$"):
        syncbn.convert_sync_batchnorm(model)


def test_the_class_method_warns_too():
    with pytest.warns(UserWarning, match=r"the module \(Shifted\)"):
        syncbn.SyncBatchNorm.convert_sync_batchnorm(Shifted(3))


def test_layers_inside_one_that_is_left_alone_are_converted():
    model, rows = SplitBatchNorm2d(3), []
    with pytest.warns(UserWarning, match="SplitBatchNorm2d"):
        syncbn.convert_sync_batchnorm(model, report=rows.append)
    assert [(row.name, row.local) for row in rows] == [("", True), ("aux_bn.0", False)]
    assert isinstance(model.aux_bn[0], syncbn.SyncBatchNorm)


def test_what_is_converted_leaves_nothing_to_warn_of():
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNormAct2d(3), nn.SyncBatchNorm(3))
    for _ in range(2):
        _convert_silently(model, strict=True)
    model[0].forward = model[0].forward  # as wrappers replace it, around the synchronised one
    _convert_silently(model, strict=True)


@pytest.mark.parametrize(
    ("model", "left"),
    [(nn.Linear(2, 2), ""), (FrozenShifted(3), r"; left alone: the module \(FrozenShifted\): has")],
    ids=["no norm", "fixed"],
)
def test_strict_raises_when_there_is_nothing_to_convert(model, left):
    with pytest.raises(
        ValueError, match=rf"strict=True, but \w+ has no batch norm to conv.*{left}"
    ):
        syncbn.convert_sync_batchnorm(model, strict=True)
    _convert_silently(model)


class FrozenByItsForward(nn.BatchNorm2d):
    def forward(self, x):
        return x


class FrozenByNameAlone(nn.BatchNorm2d):
    """Keeps torch's forward."""


def test_fixed_statistics_are_told_by_the_class_that_has_a_forward_of_its_own():
    told = []
    parametrized = FrozenByItsForward(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    syncbn.convert_sync_batchnorm(parametrized, report=told.append)
    replaced = FrozenByNameAlone(3)
    replaced.forward = lambda x: x
    with pytest.warns(UserWarning, match="its forward was replaced"):
        syncbn.convert_sync_batchnorm(replaced, report=told.append)
    assert [(one.left_alone[:9], one.local) for one in told] == [
        ("has fixed", False),
        ("its forwa", True),
    ]
