"""Layers that nobody named are told apart by the order in which they were built and used."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of


def _use(group, *serials):
    for serial in serials:
        what = Fingerprint("SyncBatchNorm(1)", 1, torch.float32, True, serial)
        exchange_of(group).gather(torch.ones(3), FORWARD, what)


def _group():
    return dist.new_group(list(range(dist.get_world_size())))


@pytest.mark.world_size(2)
def test_identical_layers_in_opposite_order_disagree_by_the_second_exchange(world_size):
    group, order = _group(), [(4, 5), (5, 4)][dist.get_rank()]
    _use(group, order[0])
    with pytest.raises(syncbn.RanksDisagree, match=r"number 2 to be used, [12] by age"):
        _use(group, order[1])


@pytest.mark.world_size(2)
def test_identical_layers_that_change_places_later_disagree(world_size):
    group = _group()
    _use(group, 4, 5, 5, 4)
    with pytest.raises(syncbn.RanksDisagree, match=r"number [12] to be used.*number [12]"):
        _use(group, [4, 5][dist.get_rank()])


@pytest.mark.world_size(2)
def test_a_rank_that_failed_is_not_behind_afterwards(world_size):
    group = _group()
    if dist.get_rank() == 0:
        exchange_of(group).fail("no input")
    else:
        with pytest.raises(syncbn.RanksDisagree, match="rank 0 failed in no input"):
            _use(group, 3)
    _use(group, 4, 5)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "serials",
    [
        pytest.param([(0, 1, 2, 0), (7, 8, 9, 7)], id="built before"),
        pytest.param([(0, 1, 20, 21), (0, 1, 2, 3)], id="built between"),
        pytest.param([(2, 0, 1), (12, 3, 5)], id="used in another order than built"),
    ],
)
def test_ranks_that_built_more_layers_agree(world_size, serials):
    _use(_group(), *serials[dist.get_rank()])


@pytest.mark.world_size(2)
@pytest.mark.parametrize("moved", ["unpickled", "copied"])
def test_layers_that_one_rank_built_and_the_other_was_given_agree(world_size, moved):
    backbone = nn.Sequential(syncbn.SyncBatchNorm(2), syncbn.SyncBatchNorm(2))
    if dist.get_rank() == 1:
        backbone = (
            copy.deepcopy(backbone) if moved == "copied" else pickle.loads(pickle.dumps(backbone))
        )
    model = nn.Sequential(backbone, syncbn.SyncBatchNorm(2))
    for _ in range(2):
        model(torch.randn(4, 2) + dist.get_rank()).square().sum().backward()
    means = [torch.empty(2) for _ in range(world_size)]
    dist.all_gather(means, backbone[0].running_mean)
    assert torch.equal(*means)
