"""The gather through the group, of ranks that can neither share memory nor connect."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_for, exchange_of
from syncbn.norm.comm.fingerprint import RankLost
from syncbn.norm.comm.transports.process_group import PAYLOAD_BYTES, Group


def _gather(group, values, layer="bn1"):
    what = Fingerprint(layer, len(values), values.dtype, needs_grad=True)
    return exchange_of(group).gather(values, FORWARD, what)


def _group():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SYNCBN_EXCHANGE", "gloo")
        group = dist.new_group()
        _gather(group, torch.ones(3))
    assert type(exchange_of(group).transport) is Group
    return group


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("size", [1, PAYLOAD_BYTES // 4, PAYLOAD_BYTES // 4 + 1, 30000])
def test_payloads_of_any_size_arrive_in_rank_order(world_size, size):
    gathered = _gather(_group(), torch.arange(size) + 1e6 * dist.get_rank())
    expected = torch.stack([torch.arange(size) + 1e6 * rank for rank in range(world_size)])
    assert torch.equal(gathered, expected)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("sizes", [(4, 4), (64, 128), (64, 9000)])
def test_ranks_that_disagree_find_out_without_connections(world_size, sizes):
    group, rank = _group(), dist.get_rank()
    own, size = ("bn2", sizes[1]) if rank == 1 else ("bn1", sizes[0])
    match = f"rank {rank} is in the forward of SyncBatchNorm '{own}'.*; rank [01] is in the"
    with pytest.raises(syncbn.RanksDisagree, match=match):
        _gather(group, torch.ones(size), own)
    assert torch.equal(_gather(group, torch.ones(5)), torch.ones(world_size, 5))


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("Timed out waiting 30000ms for send", syncbn.RanksDisagree, "rank 1: it did not come"),
        ("Connection closed by peer [10.0.0.2]:9", RankLost, "rank 1: it exited, .*10.0.0.2"),
        ("Too many open files", RuntimeError, "the exchange failed: Too many open files"),
    ],
)
def test_what_gloo_says_is_told_as_what_it_means_for_the_layer(world_size, text, error, match):
    group = _group()
    if dist.get_rank() == 0:
        work = Mock(**{"wait.side_effect": RuntimeError(text), "is_completed.return_value": True})
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *_, **__: work)
            with pytest.raises(error, match=f"rank 0 is in the forward of .*{match}") as raised:
                _gather(group, torch.ones(3))
        assert type(raised.value) is error
        with pytest.raises(syncbn.RanksDisagree, match=match):
            _gather(group, torch.ones(3))


@pytest.mark.world_size(2)
def test_a_group_of_one_needs_no_exchange(world_size):
    x = torch.ones(4, 3)
    assert exchange_for(1, x) is None
    assert exchange_for(None, x.to("meta")) is None
    assert exchange_for(None, x) is exchange_of(dist.group.WORLD)
    alone = [dist.new_group([rank]) for rank in range(world_size)][dist.get_rank()]
    assert exchange_for(alone, x) is None
