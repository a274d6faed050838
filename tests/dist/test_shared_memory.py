"""Ranks of one machine exchange through memory: the same bits as through gloo, and no hang when it goes wrong."""

import gc
import os
import subprocess
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import batch_norm, forward_backward

import syncbn
from syncbn.norm import shared
from syncbn.norm.exchange import exchange_of
from syncbn.norm.shared import SharedMemory
from syncbn.norm.wire import Wire


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
    return exchange_of(group).gather(
        values, kind=1, layer="bn1", channels=1, dtype=values.dtype, needs_grad=True
    )


@pytest.mark.world_size(2, 3, 4)
def test_memory_and_gloo_give_the_same_bits(world_size):
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for choice, kind in (("gloo", Wire), ("shared", SharedMemory)):
        with _exchanging_by(choice):
            layer = syncbn.convert_sync_batchnorm(batch_norm(6), group := _group())
            y, dx = forward_backward(layer, x, x.sin())
        assert type(exchange_of(group)._frames) is kind
        results.append((y, dx, layer.running_mean, layer.running_var))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.world_size(2, 4)
def test_a_thousand_exchanges_bring_every_ranks_latest_values(world_size):
    group = _group()
    for step in range(1000):
        gathered = _gather(group, torch.tensor([float(step), float(dist.get_rank())]))
        assert gathered.tolist() == [[step, rank] for rank in range(world_size)]


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
@pytest.mark.parametrize("obstacle", ["machine", "kernel", "full", "elsewhere", "unwilling"])
def test_ranks_that_cannot_share_memory_all_take_the_wire(world_size, obstacle):
    patch = pytest.MonkeyPatch()
    if obstacle == "machine":
        patch.setattr(shared.platform, "machine", lambda: "aarch64")
    elif obstacle == "kernel":
        patch.setattr(shared.os, "memfd_create", _no_space)
    elif obstacle == "full":
        patch.setattr(shared.os, "posix_fallocate", _no_space)
    elif obstacle == "unwilling" and dist.get_rank() == 1:
        patch.setenv("SYNCBN_EXCHANGE", "gloo")
    elif dist.get_rank() == 1:
        patch.setattr(shared, "_namespace", lambda: b"pid:[another machine's]")
    try:
        assert _gather(group := _group(), torch.ones(2)).sum() == 4
    finally:
        patch.undo()
    assert type(exchange_of(group)._frames) is Wire


def _no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.world_size(2)
def test_what_cannot_be_had_is_an_error_where_it_was_demanded(world_size):
    patch = pytest.MonkeyPatch()
    patch.setattr(shared.platform, "machine", lambda: "aarch64")
    try:
        with _exchanging_by("shared"), pytest.raises(RuntimeError, match="cannot share memory"):
            _gather(_group(), torch.ones(2))
    finally:
        patch.undo()
    with (
        _exchanging_by("pigeon"),
        pytest.raises(ValueError, match="'pigeon' is not allowed: auto, gloo"),
    ):
        _gather(_group(), torch.ones(2))


@pytest.mark.world_size(2)
def test_a_rank_that_does_not_come_is_named_when_the_time_is_up(world_size):
    group = _group(timeout=timedelta(seconds=1))
    _gather(group, torch.ones(2))
    if dist.get_rank() == 0:
        began = time.monotonic()
        with pytest.raises(
            RuntimeError,
            match=r"rank 0 is in the forward of .*'bn1' \(call 2.*waits for rank 1: .*1 s",
        ):
            _gather(group, torch.ones(2))
        assert 0.9 < time.monotonic() - began < 10


@pytest.mark.world_size(2)
@pytest.mark.parametrize("buried", [True, False], ids=["buried", "zombie"])
def test_a_rank_that_died_is_named_at_once(world_size, buried):
    group = _group()
    _gather(group, torch.ones(2))
    if dist.get_rank() == 1:
        ended = subprocess.Popen(["true"])
        if buried:
            ended.wait()
        else:
            time.sleep(0.5)
        exchange_of(group)._frames._pids[1] = ended.pid
    dist.barrier()
    if dist.get_rank() == 0:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="waits for rank 1: it died"):
            _gather(group, torch.ones(2))
        assert time.monotonic() - began < 5
