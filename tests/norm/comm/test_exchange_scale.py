"""Where a gather would move too much, sums are reduced: nearly the same statistics, the same bits on every rank."""

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close

import syncbn
from syncbn.norm import moments
from syncbn.norm.comm.exchange import exchange_of
from syncbn.norm.comm.fingerprint import BACKWARD, FORWARD, Fingerprint
from syncbn.norm.comm.transports import process_group as wire
from syncbn.norm.comm.transports.shared_memory import SharedMemory
from syncbn.norm.moments import add_rows

CHANNELS = 5


def _group(monkeypatch, limit_bytes=64):
    monkeypatch.setattr(wire, "GATHER_BYTES", limit_bytes)
    monkeypatch.setenv("SYNCBN_EXCHANGE", "gloo")
    return dist.new_group(list(range(dist.get_world_size())))


def _values(rank, mean, dtype=torch.float32):
    count = [7, 0, 30, 2][rank]
    generator = torch.Generator().manual_seed(rank)
    return mean + torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)


def _packed(x):
    count = torch.tensor(float(len(x)), dtype=torch.float64)
    mean = x.mean(0) if len(x) else x.new_zeros(CHANNELS)
    return moments.pack(moments.Moments(count, mean, ((x - mean) ** 2).sum(0)))


def _what(layer="bn1", dtype=torch.float32, channels=CHANNELS):
    return Fingerprint(layer, channels, dtype, needs_grad=True)


def _sums(exchange, values, what):
    return add_rows(exchange.combine(values.flatten(), BACKWARD, what)).view_as(values)


def _merged(packed):
    return moments.merge(*moments.unpack(packed))


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_reduced_moments_are_those_of_all_values(world_size, mean):
    with pytest.MonkeyPatch.context() as monkeypatch:
        exchange = exchange_of(_group(monkeypatch))
        own = _packed(_values(dist.get_rank(), mean))
        reduced = exchange.combine(own, FORWARD, _what())
        gathered = exchange.gather(own, FORWARD, _what())
    assert reduced.shape == (1, own.numel())
    assert reduced.dtype == own.dtype
    for ours, theirs in zip(_merged(reduced), _merged(gathered), strict=True):
        assert_close(ours, theirs, 1e-6)
    everyone = [torch.empty_like(reduced) for _ in range(world_size)]
    dist.all_gather(everyone, reduced)
    assert all(torch.equal(reduced, other) for other in everyone)


@pytest.mark.world_size(3)
def test_reduced_sums_are_the_sums_of_all_ranks(world_size):
    values = torch.arange(10.0).view(2, 5) * 10 ** dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        reduced = _sums(exchange_of(_group(monkeypatch)), values, _what())
        gathered = _sums(exchange_of(_group(monkeypatch, 2**20)), values, _what())
    assert torch.equal(reduced, torch.arange(10.0).view(2, 5) * 111)
    assert torch.equal(reduced, gathered)
    assert reduced.dtype == values.dtype


@pytest.mark.world_size(2)
def test_float64_is_always_gathered(world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        exchange = exchange_of(_group(monkeypatch))
        own = _packed(_values(dist.get_rank(), 1e6, torch.float64))
        gathered = exchange.combine(own, FORWARD, _what(dtype=torch.float64))
    assert torch.equal(gathered[dist.get_rank()], own)


@pytest.mark.world_size(2)
def test_shared_memory_gathers_whatever_the_size(world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        group = _group(monkeypatch)
        monkeypatch.setenv("SYNCBN_EXCHANGE", "auto")
        exchange = exchange_of(group)
        own = _packed(_values(0, 0.0))
        exchange.gather(own, FORWARD, _what())
        if type(exchange.transport) is not SharedMemory:
            pytest.skip("the native library is not built: there is no shared memory")
        assert exchange.combine(own, FORWARD, _what()).shape[0] == world_size


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_ranks_that_disagree_find_out_before_they_reduce(world_size, direction):
    with pytest.MonkeyPatch.context() as monkeypatch:
        exchange = exchange_of(_group(monkeypatch))
        own = _what(layer=f"bn{dist.get_rank() == 1}")
        values = _packed(_values(0, 0.0)) if direction == FORWARD else torch.ones(2 * CHANNELS)
        with pytest.raises(syncbn.RanksDisagree, match="'bnTrue'"):
            exchange.combine(values, direction, own)


@pytest.mark.world_size(2)
def test_one_rank_that_would_gather_and_one_that_would_reduce_disagree(world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        exchange = exchange_of(_group(monkeypatch, 600))
        width = [2, 400][dist.get_rank()]
        with pytest.raises(syncbn.RanksDisagree):
            exchange.combine(torch.ones(2 * width), BACKWARD, _what(channels=width))


def test_first_frames_never_exceed_what_may_be_gathered_nor_fall_below_a_header():
    for world_size in (2, 8, 64, 1024, 10**6):
        size = wire.frame_bytes(world_size)
        assert size >= wire.HEADER_BYTES
        assert size * world_size <= max(wire.GATHER_BYTES, world_size * wire.HEADER_BYTES)
    assert wire.frame_bytes(8) == wire.HEADER_BYTES + wire.PAYLOAD_BYTES
