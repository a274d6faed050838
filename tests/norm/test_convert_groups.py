"""Process groups through a conversion: torch's layers keep theirs, and a rank outside a group may hold its layers."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, own_part
from torch import nn

import syncbn


def _pair():
    """The group of ranks 0 and 1 of three; on rank 2, what torch gives to a rank outside."""
    return dist.new_group([0, 1])


@pytest.mark.world_size(3)
def test_torchs_layer_keeps_its_group_and_has_it_again_after_reverting(world_size):
    pair = _pair()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), pair).double()
    syncbn.convert_sync_batchnorm(model)
    assert model[0].process_group is pair
    if dist.get_rank() < 2:
        whole = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = own_part(nn.BatchNorm1d(4).double()(whole), (2, 4))
        assert_close(model(own_part(whole, (2, 4))), expected, 1e-10)
        assert copy.deepcopy(model)[0].process_group is pair
    syncbn.revert_sync_batchnorm(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group is pair


def test_a_group_given_to_the_conversion_replaces_torchs_until_it_is_reverted():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
    syncbn.convert_sync_batchnorm(model, process_group="node")
    assert model[0].process_group == "node"
    syncbn.revert_sync_batchnorm(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group is None


def test_an_attribute_of_another_layer_that_bears_the_name_is_no_group():
    layer = nn.BatchNorm1d(4)
    layer.process_group = "everyone"
    assert syncbn.convert_sync_batchnorm(layer).process_group is None
    assert syncbn.revert_sync_batchnorm(layer).process_group == "everyone"


@pytest.mark.world_size(3)
@pytest.mark.parametrize("torchs_first", [False, True])
def test_a_rank_outside_the_group_converts_copies_evaluates_and_reverts(world_size, torchs_first):
    pair, model = _pair(), nn.Sequential(nn.BatchNorm1d(4))
    if torchs_first:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, pair)
    model = syncbn.convert_sync_batchnorm(model, None if torchs_first else pair)
    if dist.get_rank() < 2:
        model(torch.randn(2, 4)).sum().backward()
        return
    assert "process_group=<without this rank>" in repr(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(2, 4, requires_grad=True)
        twin.eval()(x).sum().backward()
        assert syncbn.ddp_buffers_to_ignore(twin) == []
        syncbn.convert_sync_batchnorm(twin, pair)
        with pytest.raises(ValueError, match="process_group does not contain rank 2"):
            twin.train()(x)
        assert twin[0].num_batches_tracked == 0
        assert not isinstance(syncbn.revert_sync_batchnorm(twin)[0], syncbn.SyncBatchNorm)


@pytest.mark.world_size(3)
def test_a_rank_outside_the_group_makes_the_layer_and_may_not_train_with_it(world_size):
    pair, x = _pair(), torch.randn(2, 4)
    layer = syncbn.SyncBatchNorm(4, process_group=pair)
    if dist.get_rank() < 2:
        layer(x)
        syncbn.sync_batch_norm(x, process_group=pair)
        return
    refused = pytest.raises(ValueError, match="process_group does not contain rank 2")
    with refused:
        layer(x)
    with refused:
        syncbn.sync_batch_norm(x, process_group=pair)
    with refused:
        syncbn.recalibrate(layer, [x], process_group=pair)
    with refused:
        list(syncbn.in_lockstep([x], pair))
