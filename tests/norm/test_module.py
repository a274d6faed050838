"""The layer without ranks: arguments, plain behaviour, state."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close, batch_norm
from torch import nn

import syncbn
from syncbn.norm import backends as kernels
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import NormArgs
from syncbn.norm.comm.groups import check_spec, resolve
from syncbn.norm.moments import Moments, merge, unpack

STATISTICS = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features=0 is not allowed"),
        ({"num_features": -1}, ValueError, "num_features=-1"),
        ({"num_features": 2.5}, TypeError, "num_features=2.5"),
        ({"num_features": "64"}, TypeError, "num_features='64'"),
        ({"num_features": True}, TypeError, "num_features=True"),
        ({"num_features": np.True_}, TypeError, "num_features=np.True_"),
        ({"num_features": np.float64(4)}, TypeError, r"num_features=np.float64\(4.0\)"),
        ({"num_features": np.int64(0)}, ValueError, r"num_features=np.int64\(0\)"),
        ({"num_features": None}, TypeError, "num_features=None"),
        ({"num_features": 4, "eps": 0}, ValueError, "eps=0"),
        ({"num_features": 4, "eps": -1}, ValueError, "eps=-1"),
        ({"num_features": 4, "eps": math.nan}, ValueError, "eps=nan"),
        ({"num_features": 4, "eps": "x"}, TypeError, "eps='x'"),
        ({"num_features": 4, "eps": None}, TypeError, "eps=None"),
        ({"num_features": 4, "eps": np.True_}, TypeError, "eps=np.True_"),
        ({"num_features": 4, "eps": np.float32(0)}, ValueError, r"eps=np.float32\(0.0\)"),
        ({"num_features": 4, "momentum": 5}, ValueError, "momentum=5"),
        ({"num_features": 4, "momentum": -0.1}, ValueError, "momentum=-0.1"),
        ({"num_features": 4, "momentum": math.nan}, ValueError, "momentum=nan"),
        ({"num_features": 4, "momentum": "x"}, TypeError, "momentum='x'"),
        ({"num_features": 4, "momentum": np.False_}, TypeError, "momentum=np.False_"),
        ({"num_features": 4, "momentum": np.float16(2)}, ValueError, r"momentum=np.float16\(2.0\)"),
        ({"num_features": 4, "process_group": "everyone"}, ValueError, "'world' or 'node'"),
        ({"num_features": 4, "process_group": 0}, ValueError, "process_group=0"),
        ({"num_features": 4, "process_group": True}, TypeError, "process_group=True"),
        ({"num_features": 4, "process_group": [0, 1]}, TypeError, "process_group="),
        ({"num_features": 4, "process_group": np.int64(0)}, ValueError, "process_group=0"),
        ({"num_features": 4, "process_group": np.True_}, TypeError, "process_group=np.True_"),
        ({"num_features": 4, "process_group": 2.0}, TypeError, "process_group=2.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_with_what_is_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        syncbn.SyncBatchNorm(**arguments)


@pytest.mark.parametrize(
    "integer", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"]
)
@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16], ids=str)
def test_numbers_of_numpy_are_taken_as_numbers(integer, number):
    layer = syncbn.SyncBatchNorm(integer(4), number(0.25), number(0.5), process_group=np.int32(2))
    plain = syncbn.SyncBatchNorm(4, 0.25, 0.5, process_group=2)
    assert repr(layer) == repr(plain)
    x = torch.randn(6, 4, 3)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    result = syncbn.sync_batch_norm(
        x, eps=number(0.25), momentum=number(0.5), process_group=np.int8(1)
    )
    assert torch.equal(result, syncbn.sync_batch_norm(x, eps=0.25))
    assert syncbn.convert_sync_batchnorm(nn.BatchNorm1d(4), np.int64(2)).process_group == 2
    syncbn.recalibrate(nn.Sequential(nn.BatchNorm1d(4)), [x], process_group=np.int64(1))
    assert list(syncbn.in_lockstep([1], np.int64(1))) == [1]


def test_any_real_number_is_an_eps():
    assert syncbn.SyncBatchNorm(4, Fraction(1, 4), 1).eps == 0.25


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": 0}, ValueError, "eps=0 is not allowed"),
        ({"eps": "x"}, TypeError, "eps='x' is not allowed"),
        ({"momentum": 5}, ValueError, "momentum=5 is not allowed"),
        ({"act": "rleu"}, ValueError, "act='rleu' is not allowed"),
        ({"process_group": "all"}, ValueError, "process_group='all' is not allowed"),
        ({"weight": torch.ones(2)}, ValueError, r"each of 3 channels on cpu, got \(2,\)"),
        ({"bias": torch.ones(4, 1)}, ValueError, r"each of 3 channels on cpu, got \(4, 1\)"),
        ({**STATISTICS, "running_mean": torch.ones(4)}, ValueError, r"3 channels .* got \(4,\)"),
        ({**STATISTICS, "running_var": torch.ones(())}, ValueError, r"3 channels .* got \(\)"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, r"on cpu, got \(3,\) on meta"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_function_are_named_with_what_is_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        syncbn.sync_batch_norm(torch.randn(4, 3), **arguments)


@pytest.mark.parametrize("size", [4, 256], ids=["served by torch", "served by kernels"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_parameter_or_statistic_of_another_size_is_refused(name, size):
    layer = syncbn.SyncBatchNorm(3)
    value = torch.ones(2)
    setattr(layer, name, value if "running" in name else torch.nn.Parameter(value))
    with pytest.raises((ValueError, RuntimeError), match=r"3 channels|3 elements"):
        layer(torch.randn(4, 3, size, size))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_parameter_of_another_size_than_the_channels_is_refused(world_size, name):
    layer = syncbn.SyncBatchNorm(3)
    getattr(layer, name).data = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"expected one value for each of 3 channels on cpu, got \(2,\)"
    ):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("act", [None, "relu"], ids=["served by torch", "served by kernels"])
def test_a_layer_that_averages_all_batches_and_counts_none_moves_nothing(act):
    layer = syncbn.SyncBatchNorm(3, momentum=None, act=act)
    layer.num_batches_tracked = None
    layer(torch.randn(4, 3, 5, 5))
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]


def test_an_input_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"C >= 1, got 3D input \(4, 0, 5\)"):
        syncbn.sync_batch_norm(torch.zeros(4, 0, 5))


def test_the_function_averages_all_batches_only_where_it_can_count_them():
    statistics = (torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="momentum=None needs num_batches_tracked"):
        syncbn.sync_batch_norm(torch.randn(4, 3), *statistics, momentum=None)


shapes = pytest.mark.parametrize(
    "shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3), (2, 4, 2, 3, 2)], ids=str
)


def _assert_torchs_batch_norm(shape, training, bound):
    ours, theirs = (
        syncbn.SyncBatchNorm(4).train(training),
        batch_norm(4, len(shape)).train(training),
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    assert_close(ours(x), theirs(x), bound)
    for name, value in ours.state_dict().items():
        assert_close(value, theirs.state_dict()[name], bound, name)


@pytest.mark.parametrize("training", [True, False])
@shapes
def test_without_a_process_group_it_is_torchs_batch_norm_to_the_bit(shape, training, monkeypatch):
    monkeypatch.setattr(kernels, "faster_alone", lambda x: False)
    _assert_torchs_batch_norm(shape, training, 0)


@shapes
def test_without_a_process_group_faster_kernels_give_torchs_batch_norm(shape):
    _assert_torchs_batch_norm(shape, True, 1e-6)


@pytest.mark.parametrize(
    ("x", "error"),
    [(torch.randn(4), "1D"), (torch.randn(4, 5), "got 5"), (torch.zeros(2, 4).long(), "floating")],
)
def test_bad_input_is_refused_in_training_and_in_evaluation(x, error):
    for layer in (syncbn.SyncBatchNorm(4), syncbn.SyncBatchNorm(4).eval()):
        with pytest.raises((ValueError, TypeError), match=error):
            layer(x)


def test_state_dict_keys_are_batch_norms():
    assert list(syncbn.SyncBatchNorm(4).state_dict()) == list(nn.BatchNorm2d(4).state_dict())


def test_it_is_no_torch_sync_batch_norm_which_ddp_refuses_on_cpu():
    assert not isinstance(syncbn.SyncBatchNorm(4), nn.SyncBatchNorm)


def test_a_bias_is_learned_unless_it_is_declined():
    layer, x = syncbn.SyncBatchNorm(3, bias=False), torch.randn(4, 3, 5)
    assert list(layer.state_dict())[:2] == ["weight", "running_mean"]
    assert_close(layer(x), nn.BatchNorm1d(3)(x), 1e-5)
    assert syncbn.SyncBatchNorm(3, affine=False).bias is None


def test_repr_shows_the_group():
    assert "process_group='node'" in repr(syncbn.SyncBatchNorm(4, process_group="node"))
    assert "process_group" not in repr(syncbn.SyncBatchNorm(4))


def test_groups_resolve_to_nobody_without_torch_distributed():
    check_spec("world")
    assert resolve("world") is None


def test_public_names_and_no_others():
    assert dir(syncbn) == syncbn.__all__
    with pytest.raises(AttributeError, match="nothing_such"):
        getattr(syncbn, "nothing_such")  # noqa: B009


counts = st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(lambda c: sum(c) > 0)


@given(counts=counts, seed=st.integers(0, 2**20), mean=st.floats(-1e3, 1e3))
def test_merged_moments_are_those_of_the_whole_for_any_split(counts, seed, mean):
    whole = (
        torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed)).double() + mean
    )
    parts = [AtenBackend().local_stats(NormArgs(part)) for part in whole.split(counts)]
    merged = merge(*unpack(torch.stack(parts)))
    expected = Moments(
        *(part[0] for part in unpack(AtenBackend().local_stats(NormArgs(whole)).unsqueeze(0)))
    )
    assert merged.count == sum(counts)
    torch.testing.assert_close(merged.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.M2, expected.M2, rtol=1e-9, atol=1e-9)


def test_moments_of_nothing_are_zero():
    moments = merge(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3))
    assert moments.count == 0
    assert torch.equal(moments.mean, torch.zeros(3))
    assert torch.equal(moments.M2, torch.zeros(3))


def test_without_momentum_running_statistics_average_all_batches():
    layer = syncbn.SyncBatchNorm(3, momentum=None)
    batches = [torch.randn(8, 3) + mean for mean in (0.0, 1.0, 5.0)]
    for batch in batches:
        layer(batch)
    assert_close(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), 1e-6)


def test_the_free_function_serves_a_single_process_at_a_large_mean():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8) * 0.01 + 100
    running_var = torch.ones(3)
    y = syncbn.sync_batch_norm(x, torch.zeros(3), running_var, momentum=1.0)
    exact = x.double().transpose(0, 1).flatten(1)
    assert_close(running_var, exact.var(1), 1e-4, "variance")
    assert abs(float(y.mean())) < 5e-3  # float32 holds the mean to 4e-4 of a standard deviation


def test_a_layer_whose_running_statistics_were_taken_away_trains_without_them():
    layer = syncbn.SyncBatchNorm(3, act="relu")
    layer.running_mean = layer.running_var = None
    x = torch.randn(4, 3, 5)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
    torch.testing.assert_close(layer(x), expected)


def test_a_large_input_alone_gives_what_torchs_batch_norm_gives():
    x = torch.randn(8, 64, 56, 56)
    ours, theirs = syncbn.SyncBatchNorm(64), torch.nn.BatchNorm2d(64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", [None, "relu"])
def test_a_batch_without_samples_changes_nothing_alone(act):
    layer = syncbn.SyncBatchNorm(3, act=act)
    layer(torch.randn(4, 3, 2))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert layer(torch.empty(0, 3, 2)).shape == (0, 3, 2)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("given", list(STATISTICS))
def test_one_running_statistic_without_the_other_is_refused(given):
    with pytest.raises(ValueError, match="give both or neither"):
        syncbn.sync_batch_norm(torch.randn(4, 3), **{given: STATISTICS[given].clone()})
