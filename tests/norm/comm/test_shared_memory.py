"""Ranks of one machine exchange through memory: the same bits as by other ways, or all of them by another way."""

import gc
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import batch_norm, forward_backward

import syncbn
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of
from syncbn.norm.comm.transports import shared_memory as shared
from syncbn.norm.comm.transports.process_group import Group
from syncbn.norm.comm.transports.shared_memory import SharedMemory
from syncbn.norm.comm.transports.sockets import Sockets

pytestmark = pytest.mark.skipif(
    shared.library() is None, reason="the native library is not built: there is no shared memory"
)


@contextmanager
def _exchanging_by(choice):
    os.environ["SYNCBN_EXCHANGE"] = choice
    try:
        yield
    finally:
        del os.environ["SYNCBN_EXCHANGE"]


def _group(**options):
    return dist.new_group(list(range(dist.get_world_size())), **options)


def _gather(group, values):
    return exchange_of(group).gather(values, FORWARD, Fingerprint("bn1", 1, values.dtype, True))


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize(
    ("channels", "dtype"), [(6, torch.float32), (6, torch.float64), (2100, torch.bfloat16)]
)
def test_memory_connections_and_gloo_give_the_same_bits(world_size, channels, dtype):
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = torch.randn(3, 4, channels, 3, 3, generator=generator).to(dtype)
    results = []
    for choice, kind in (("sockets", Sockets), ("gloo", Group), ("shared", SharedMemory)):
        with _exchanging_by(choice):
            layer = syncbn.convert_sync_batchnorm(batch_norm(channels), group := _group())
            # after the first exchange a pass in shared memory is one call, but for 2100 channels
            passes = [forward_backward(layer, x, x.sin()) for x in batches]
        assert type(exchange_of(group).transport) is kind
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([*sum(passes, ()), *gradients, *layer.buffers()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.world_size(2, 4)
def test_a_rank_without_a_batch_exchanges_with_those_that_pass_in_one_call(world_size):
    layer = syncbn.SyncBatchNorm(3)
    for step in range(3):
        size = 0 if step and dist.get_rank() == world_size - 1 else 4
        x = torch.randn(size, 3, 5, requires_grad=True)
        layer(x).square().sum().backward()
        everyones = [torch.empty_like(layer.running_var) for _ in range(world_size)]
        dist.all_gather(everyones, layer.running_var)
        assert all(torch.equal(var, everyones[0]) for var in everyones)


@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize(("num_values", "steps"), [(2, 1000), (4098, 3000)])
def test_thousands_of_exchanges_bring_every_ranks_latest_values(world_size, num_values, steps):
    group, ranks = _group(), torch.arange(world_size).unsqueeze(1)
    for step in range(steps):
        gathered = _gather(group, torch.full((num_values,), step + 0.1 * dist.get_rank()))
        assert bool((gathered == step + 0.1 * ranks).all())


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("num_values", [0, 1, 4097, 4098, 4099, 20_000])
def test_payloads_of_any_size_arrive_whole(world_size, num_values):
    group = _group()
    for rank, values in enumerate(_gather(group, _numbers(num_values, dist.get_rank()))):
        assert torch.equal(values, _numbers(num_values, rank))


def _numbers(count, rank):
    return torch.rand(count, generator=torch.Generator().manual_seed(rank))


@pytest.mark.world_size(4)
def test_groups_side_by_side_keep_apart(world_size):
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    everyone, own = _group(), halves[dist.get_rank() // 2]
    for _ in range(50):
        rank = torch.tensor([float(dist.get_rank())])
        assert _gather(own, rank).flatten().tolist() == dist.get_process_group_ranks(own)
        assert _gather(everyone, rank).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.world_size(2)
def test_the_memory_has_no_name_and_goes_with_the_group(world_size):
    gc.collect()
    before = _num_memories()  # earlier tests of this process may hold some
    group = _group()
    _gather(group, torch.ones(3))
    assert not list(Path("/dev/shm").glob("*syncbn*"))
    assert _num_memories() == before + 1
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert _num_memories() <= before


def _num_memories():
    """Shared memories that this process holds."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += "memfd:syncbn" in str(descriptor.readlink())
    return count


@pytest.mark.world_size(2)
@pytest.mark.parametrize("obstacle", ["library", "kernel", "full", "elsewhere", "unwilling"])
def test_ranks_that_cannot_share_memory_all_connect(world_size, obstacle):
    patch = pytest.MonkeyPatch()
    if obstacle == "library" and dist.get_rank() == 1:
        patch.setattr(shared, "library", lambda: None)
    elif obstacle == "kernel":
        patch.setattr(shared.os, "memfd_create", _no_space)
    elif obstacle == "full":
        patch.setattr(shared.os, "posix_fallocate", _no_space)
    elif obstacle == "unwilling" and dist.get_rank() == 1:
        patch.setenv("SYNCBN_EXCHANGE", "gloo")
    elif dist.get_rank() == 1:
        patch.setattr(shared, "machine", lambda: "another machine")
    try:
        assert _gather(group := _group(), torch.ones(2)).sum() == 4
    finally:
        patch.undo()
    assert type(exchange_of(group).transport) is (Group if obstacle == "unwilling" else Sockets)


def _no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.world_size(2)
def test_what_cannot_be_had_is_an_error_where_it_was_demanded(world_size):
    patch = pytest.MonkeyPatch()
    patch.setattr(shared, "library", lambda: None)
    try:
        with _exchanging_by("shared"), pytest.raises(RuntimeError, match="cannot share memory"):
            _gather(_group(), torch.ones(2))
    finally:
        patch.undo()
    with (
        _exchanging_by("pigeon"),
        pytest.raises(
            ValueError, match="'pigeon' is not allowed: one of auto, shared, sockets, gloo"
        ),
    ):
        _gather(_group(), torch.ones(2))
