"""Who is synchronised with whom: by name, by size, or by ProcessGroup."""

import copy
import pickle
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from torch import nn

import syncbn
from syncbn.norm import backends as kernels
from syncbn.norm.comm import exchange, groups, processes
from syncbn.norm.comm.exchange import exchange_of
from syncbn.norm.comm.groups import Members, resolve


def _mean_seen(process_group):
    """What the running mean becomes when rank r feeds values of mean r: the mean over the group's ranks."""
    layer = syncbn.SyncBatchNorm(1, momentum=1.0, process_group=process_group)
    layer(torch.tensor([[-1.0], [1.0]]) + dist.get_rank())
    return float(layer.running_mean)


@pytest.mark.world_size(4)
@pytest.mark.parametrize(
    ("spec", "means"),
    [
        (None, [1.5] * 4),
        ("world", [1.5] * 4),
        (4, [1.5] * 4),
        (2, [0.5, 0.5, 2.5, 2.5]),
        (1, [0.0, 1.0, 2.0, 3.0]),
    ],
    ids=str,
)
def test_statistics_are_shared_within_the_group_alone(world_size, spec, means):
    assert _mean_seen(spec) == pytest.approx(means[dist.get_rank()])


@pytest.mark.world_size(4)
def test_layers_of_one_model_may_share_with_different_ranks(world_size):
    rank = dist.get_rank()
    seen = [_mean_seen(spec) for spec in (None, 2, None)]
    assert seen == [1.5, 0.5 if rank < 2 else 2.5, 1.5]


@pytest.mark.world_size(4)
def test_a_process_group_of_our_own(world_size):
    odd, even = dist.new_group([1, 3]), dist.new_group([0, 2])
    own = odd if dist.get_rank() % 2 else even
    assert _mean_seen(own) == (2.0 if dist.get_rank() % 2 else 1.0)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("local_rank", [None, "0"])
def test_node_means_the_ranks_of_one_host_however_they_were_started(world_size, local_rank):
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setattr(groups, "host", lambda: "one" if rank != 1 else "other")
        assert dist.get_process_group_ranks(resolve("node")) == ([1] if rank == 1 else [0, 2])


@pytest.mark.world_size(2)
def test_ranks_of_one_machine_are_one_node(world_size):
    assert dist.get_process_group_ranks(resolve("node")) == [0, 1]


def test_hosts_are_told_apart_by_name_and_by_boot(monkeypatch):
    names = {processes.host()}
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "another")
    names.add(processes.host())
    monkeypatch.setattr(processes, "_boot", lambda: "another")
    names.add(processes.host())
    assert len(names) == 3


@pytest.mark.world_size(3)
def test_a_size_that_does_not_divide_the_world_is_refused(world_size):
    with pytest.raises(ValueError, match="process_group=2 does not divide the world size 3"):
        _mean_seen(2)


@pytest.mark.world_size(2)
def test_groups_wait_no_longer_than_the_world_does(world_size):
    assert Members(resolve(2)).timeout_s == Members(dist.group.WORLD).timeout_s


@pytest.mark.world_size(2)
def test_groups_are_made_once(world_size):
    assert resolve(1) is resolve(1)


@pytest.mark.world_size(2)
def test_a_destroyed_group_is_refused(world_size):
    group = dist.new_group([0, 1])
    dist.barrier()  # both are connected
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="process_group was destroyed"):
        _mean_seen(group)


def _converted(num_features, process_group):
    return syncbn.convert_sync_batchnorm(nn.BatchNorm1d(num_features), process_group)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("make", [syncbn.SyncBatchNorm, _converted])
def test_a_group_without_this_rank_is_refused_when_this_rank_trains_and_not_before(
    world_size, make
):
    group = dist.new_group([0])
    layer = make(3, process_group=group)
    x = torch.randn(4, 3)
    assert torch.equal(layer.eval()(x), nn.BatchNorm1d(3).eval()(x))
    layer.train()
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="does not contain rank 1, which cannot"):
            layer(x)
    else:
        layer(x)


@pytest.mark.world_size(2)
def test_layers_in_named_groups_pickle_and_copy(world_size):
    layer = syncbn.SyncBatchNorm(2, process_group="node")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.process_group == "node"
        assert twin.weight is not layer.weight
        assert torch.equal(twin.weight, layer.weight)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("converted", [True, False])
def test_deep_copies_share_a_process_group(world_size, converted):
    group = dist.new_group([0, 1])
    model = nn.Sequential(syncbn.SyncBatchNorm(2, process_group=group))
    if converted:
        model = syncbn.convert_sync_batchnorm(
            nn.Sequential(nn.SyncBatchNorm(2, process_group=group)), group
        )
    twin = copy.deepcopy(model)
    assert twin[0].process_group is group
    x = torch.randn(4, 2)
    assert_close(twin(x), model(x), 0.0)


@pytest.mark.world_size(1)
def test_a_world_of_one_is_plain_batch_norm_to_the_bit(world_size):
    x = torch.randn(4, 3, 5, 5)
    ours, theirs = syncbn.SyncBatchNorm(3), nn.BatchNorm2d(3)
    with mock.patch.object(kernels, "faster_alone", return_value=False):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    with pytest.raises(ValueError, match="expected 3 channels, got 4"):
        ours(torch.randn(2, 4))


@pytest.mark.world_size(2)
def test_a_fork_of_a_rank_exchanges_in_none_of_its_groups_and_in_its_own(world_size):
    own = [dist.group.WORLD, dist.new_group()]
    exchange_of(own[0])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(exchange, "_exchanges", weakref.WeakKeyDictionary())
        monkeypatch.setattr(groups, "_parents", None)
        exchange_of(own[0])
        groups._forked()
        exchange._exchanges.clear()
        for group in own:
            with pytest.raises(RuntimeError, match="was forked from a rank and is none itself"):
                exchange_of(group)
        monkeypatch.setattr(groups, "_parents", lambda: None)  # that group was left for another
        assert exchange_of(own[1]).world_size == world_size
