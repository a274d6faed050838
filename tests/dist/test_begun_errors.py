"""Layers that are begun together, where ranks or callers do it wrong."""

import copy
import re
import weakref
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from counting import by_way
from siblings import CHANNELS, inputs_of, siblings

import syncbn
from syncbn.norm.exchange import exchange_of

over_sockets = by_way("sockets")


@over_sockets
@pytest.mark.world_size(2)
@pytest.mark.parametrize("second", [True, False])
def test_ranks_that_begin_other_layers_disagree(world_size, second):
    a, b, *_ = inputs_of(world_size)
    layers = siblings(names=("", "")) if second else siblings()
    other = copy.deepcopy(layers[1])
    rank = dist.get_rank()
    if second:  # without names, at the second meeting
        other = syncbn.SyncBatchNorm(CHANNELS[1])
        for _ in range(2):
            for one in syncbn.begin_norms((layers[0], a), (layers[1], b), (other, b)):
                one.finish()
    else:
        other.layer_name = "elsewhere"
    chosen = [(layers[1], other), (other, layers[1])][rank]
    begun = syncbn.begin_norms((layers[0], a), *((layer, b) for layer in chosen))
    with pytest.raises(syncbn.RanksDisagree, match=r"rank 0 is in.*rank 1 is in|rank 1 is.*rank 0"):
        begun[0].finish()


@over_sockets
@pytest.mark.world_size(2)
def test_long_names_that_end_alike_are_told_apart(world_size):
    a, b, *_ = inputs_of(world_size)
    block = "ab"[dist.get_rank()]
    names = [f"{block}.{'branch' * 12}{n}.norm" for n in range(2)]
    begun = syncbn.begin_norms(*zip(siblings(names=names), (a, b), strict=True))
    with pytest.raises(syncbn.RanksDisagree, match="rank 0 is in"):
        begun[0].finish()


@over_sockets
@pytest.mark.world_size(2)
def test_an_exchange_that_failed_stays_failed_and_keeps_nothing_alive(world_size):
    a, b, *_ = inputs_of(world_size)
    layers = siblings(names=("a", f"b{dist.get_rank()}"))

    def fail():
        x = b + 1
        with suppress(syncbn.RanksDisagree):
            layers[1](x)
        return weakref.ref(x)

    assert fail()() is None  # nor does the error of a layer that is called
    first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
    with pytest.raises(syncbn.RanksDisagree) as failure:
        layers[0](torch.randn(4, CHANNELS[0], 2, 2))  # the next exchange waits for it
    said = str(failure.value)
    with pytest.raises(syncbn.RanksDisagree, match=re.escape(said)):
        second.finish()
    with pytest.raises(syncbn.RanksDisagree, match=re.escape(said)):
        first.finish()


@over_sockets
@pytest.mark.world_size(2)
def test_connections_end_with_their_group_though_nobody_waits(world_size):
    a, b, *_ = inputs_of(world_size)
    group = dist.new_group(list(range(world_size)))
    layers = siblings(group=group)
    [one.finish() for one in syncbn.begin_norms((layers[0], a), (layers[1], b))]
    transport = weakref.ref(exchange_of(group)._transport)
    syncbn.begin_norms((layers[0], a), (layers[1], b))
    del layers
    dist.destroy_process_group(group)
    del group
    assert transport() is None


@over_sockets
@pytest.mark.world_size(2)
def test_bad_input_on_one_rank_is_an_error_on_all(world_size):
    a, b, *_ = inputs_of(world_size)
    layers = siblings()
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="expected 5 channels, got 3"):
            syncbn.begin_norms((layers[0], a), (layers[1], a))
    else:
        begun = syncbn.begin_norms((layers[0], a), (layers[1], b))
        with pytest.raises(syncbn.RanksDisagree, match=r"rank 0 failed in b\.side\.1: expected 5"):
            begun[1].finish()


@over_sockets
@pytest.mark.world_size(2)
def test_what_changed_since_it_began_is_refused(world_size):
    a, b, residual, _ = inputs_of(world_size)
    layers = siblings()

    def begun():
        return syncbn.begin_norms((layers[0], a), (layers[1], b))[0]

    one = begun()
    one.finish()
    with pytest.raises(RuntimeError, match=r"b\.\{main, side.1\}: finish\(\) was called twice"):
        one.finish()
    one = begun()
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="its input or its mode has changed since it was begun"):
        one.finish()
    one = begun()
    with torch.no_grad(), pytest.raises(RuntimeError, match="its mode has changed"):
        one.finish()
    mask = torch.ones(len(a), 1, 4, 6, dtype=torch.bool)
    (one,) = syncbn.begin_norms((layers[0], a, mask))
    mask[0] = False
    with pytest.raises(RuntimeError, match="its input or its mode has changed"):
        one.finish()
    one = begun()
    hook = layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with pytest.raises(RuntimeError, match="it is given another input"):
        one.finish()
    hook.remove()
    one = begun()
    layers[0].eval()
    with pytest.raises(RuntimeError, match="its input or its mode has changed"):
        one.finish()
    layers[0].train()
    assert torch.equal(begun().finish(residual), layers[0](a, residual=residual))


@over_sockets
@pytest.mark.world_size(2)
def test_hooks_of_a_layer_see_its_input_and_output(world_size):
    a, b, *_ = inputs_of(world_size)
    layers, seen = siblings(), []
    layers[0].register_forward_hook(lambda layer, args, y: seen.append((layer, *args, y)))
    first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
    y = first.finish()
    second.finish()
    assert [len(call) for call in seen] == [3]
    assert all(got is given for got, given in zip(seen[0], (layers[0], a, y), strict=True))
