"""The gather through the group, of ranks that can neither share memory nor connect."""

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of
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
