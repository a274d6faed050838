"""Ranks that do not agree get an error on every rank, soon, and the layer is usable afterwards."""

import time
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import syncbn


def _refused_on_every_rank(layer, x, match, error=syncbn.RanksDisagree):
    began = time.monotonic()
    with pytest.raises(error, match=match):
        layer(x)
    assert time.monotonic() - began < 10
    again = syncbn.SyncBatchNorm(3)
    assert again(torch.randn(4, 3)).shape == (4, 3)


@pytest.mark.world_size(2, 3)
def test_another_number_of_channels(world_size):
    channels = 64 if dist.get_rank() == 0 else 128
    _refused_on_every_rank(
        syncbn.SyncBatchNorm(channels),
        torch.randn(4, channels),
        "64 channels.*128 channels|128.*64",
    )


@pytest.mark.world_size(2)
def test_channels_beyond_one_frame_against_channels_within(world_size):
    channels = 64 if dist.get_rank() == 0 else 9000
    _refused_on_every_rank(syncbn.SyncBatchNorm(channels), torch.randn(4, channels), "channels")


@pytest.mark.world_size(2)
def test_another_dtype(world_size):
    dtype = torch.float32 if dist.get_rank() == 0 else torch.bfloat16
    _refused_on_every_rank(
        syncbn.SyncBatchNorm(3), torch.randn(4, 3).to(dtype), "float32.*bfloat16|bfloat16"
    )


@pytest.mark.world_size(2)
def test_another_layer_order_names_both_layers_and_ranks(world_size):
    model = torch.nn.ModuleDict(
        {"first": torch.nn.BatchNorm1d(3), "second": torch.nn.BatchNorm1d(3)}
    )
    syncbn.convert_sync_batchnorm(model)
    mine, other = ("first", "second") if dist.get_rank() == 0 else ("second", "first")
    match = f"rank {dist.get_rank()} is in the forward of SyncBatchNorm '{mine}'.*'{other}'"
    _refused_on_every_rank(model[mine], torch.randn(4, 3), match)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("by", ["input", "mode"])
def test_gradients_wanted_on_one_rank_only(world_size, by):
    wanted = dist.get_rank() == 0
    x = torch.randn(4, 3, requires_grad=wanted or by == "mode")
    with torch.set_grad_enabled(wanted or by == "input"):
        _refused_on_every_rank(syncbn.SyncBatchNorm(3), x, "no gradient")


@pytest.mark.world_size(2)
def test_forward_on_one_rank_and_backward_on_the_other(world_size):
    layer = syncbn.SyncBatchNorm(3)
    y = layer(torch.randn(4, 3, requires_grad=True))
    enter = (
        y.sum().backward
        if dist.get_rank() == 0
        else lambda: layer(torch.randn(4, 3, requires_grad=True))
    )
    with pytest.raises(syncbn.RanksDisagree, match=r"backward.*forward|forward.*backward"):
        enter()


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "error"),
    [
        ((4,), "float32", "strided", "got 1D input"),
        ((4, 5), "float32", "strided", "expected 3 channels, got 5"),
        ((4, 3), "int64", "strided", "floating-point input"),
        ((4, 3), "float32", "sparse_coo", "expected a dense input"),
    ],
)
def test_bad_input_on_one_rank_is_reported_on_all(world_size, shape, dtype, layout, error):
    bad = torch.zeros(shape, dtype=getattr(torch, dtype), layout=getattr(torch, layout))
    layer = syncbn.SyncBatchNorm(3)
    if dist.get_rank() == 0:
        _refused_on_every_rank(layer, bad, error, (ValueError, TypeError))
    else:
        _refused_on_every_rank(
            layer, torch.randn(4, 3), f"rank 0 failed in SyncBatchNorm.3.: .*{error}"
        )
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.world_size(2)
def test_a_transform_on_one_rank_is_reported_on_all(world_size):
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
            torch.func.vmap(layer)(torch.randn(2, 4, 3))
        layer(x)
    else:
        _refused_on_every_rank(layer, x, "rank 0 failed in SyncBatchNorm.3.: torch.func transforms")


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_on_one_rank_is_named_on_all(world_size, value):
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3)
    if dist.get_rank() == 1:
        x[2, 1] = value
    _refused_on_every_rank(layer, x, "on rank 1", syncbn.NonFiniteStatistics)
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0


@pytest.mark.world_size(2)
@pytest.mark.parametrize("when", ["begun", "waited for"])
def test_an_exchange_through_the_group_stays_failed_once_the_group_has_failed(world_size, when):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SYNCBN_EXCHANGE", "gloo")
        layer = syncbn.SyncBatchNorm(3, process_group=dist.new_group([0, 1]))
        layer(torch.randn(4, 3))
        work = Mock(wait=_time_out)
        gather = _time_out if when == "begun" else lambda *_, **__: work
        monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
        with pytest.raises(RuntimeError, match=r"SyncBatchNorm.*: the exchange failed: no answer"):
            layer(torch.randn(4, 3))
    with pytest.raises(
        syncbn.RanksDisagree, match=r"sequence number 2.*the exchange failed: no answer"
    ):
        layer(torch.randn(4, 3))


def _time_out(*_, **__):
    raise RuntimeError("no answer")
