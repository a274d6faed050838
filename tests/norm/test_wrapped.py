"""The layer on ranks under what wraps layers: checkpointing, torch.compile, fused operands."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from counting import counting
from oracle import assert_close, batch_norm, own_part
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn

SIZES = (2, 4)


def _model(norm=None):
    torch.manual_seed(5)
    norm = norm or batch_norm(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        norm,
        nn.SiLU(),
        nn.Conv2d(4, 4, 1, bias=False),
        batch_norm(4),
    )


@pytest.mark.world_size(2)
def test_a_checkpointed_pass_neither_exchanges_nor_counts_again(world_size):
    whole = torch.randn(2, 6, 3, 5, 5)
    plain, replayed = (syncbn.convert_sync_batchnorm(_model()) for _ in range(2))
    parts = [own_part(w, SIZES) for w in whole]
    counted = counting()
    for part in parts:
        plain(part).square().sum().backward()
    expected = list(counted)
    counted.clear()
    # two graphs alive at once, replayed in the order in which they were made
    losses = [checkpoint(replayed, part, use_reentrant=False).square().sum() for part in parts]
    for loss in losses:
        loss.backward()
    assert sorted(counted) == sorted(expected)
    assert len(counted) == 8  # two layers, two passes, forward and backward
    for (name, a), b in zip(replayed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(replayed.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-6, name)


@pytest.mark.world_size(2)
def test_reentrant_checkpointing_counts_once(world_size):
    plain, replayed = (syncbn.convert_sync_batchnorm(_model()) for _ in range(2))
    part = own_part(torch.randn(6, 3, 5, 5), SIZES).requires_grad_()
    plain(part).square().sum().backward()
    checkpoint(replayed, part, use_reentrant=True).square().sum().backward()
    for (name, a), b in zip(replayed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(replayed.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-6, name)


@pytest.mark.slow_if(lambda group, **_: group in (1, 2))
@pytest.mark.world_size(2)
@pytest.mark.parametrize("group", [None, 1, 2, "node", "handle"])
def test_compiled_without_a_graph_break_it_gives_the_eager_numbers(world_size, group):
    group = dist.group.WORLD if group == "handle" else group
    model = syncbn.convert_sync_batchnorm(_model(), group)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = own_part(torch.randn(6, 3, 5, 5), SIZES)
    dy = torch.randn(len(x), 4, 5, 5)
    for training in (True, False):
        for net in (compiled, plain):
            net.train(training)
            net.zero_grad()
            net(x).backward(dy)
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad, 1e-5, name)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-6, name)


@pytest.mark.untraced
@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_function_compiles_to_the_same_numbers(world_size, momentum):
    torch.manual_seed(2)
    whole = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
    x, residual = (
        own_part(one, SIZES if world_size == 2 else [6]).requires_grad_() for one in whole
    )
    weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    mask = torch.rand(len(x), 1, 5) > 0.3
    dy = torch.randn_like(x)
    results = []
    for function in (torch.compile(_masked, fullgraph=True, backend="aot_eager"), _masked):
        running = torch.zeros(3), torch.ones(3), torch.tensor(0)
        for _ in range(2):
            y = function(x, residual, weight, bias, mask, running, momentum)
        gradients = torch.autograd.grad(y, (x, residual, weight, bias), dy)
        results.append((y, *gradients, *running))
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected, 1e-5)


def _masked(x, residual, weight, bias, mask, running, momentum):
    mean, var, num_batches_tracked = running
    return syncbn.sync_batch_norm(
        x, mean, var, weight, bias, residual=residual, mask=mask, act="relu",
        momentum=momentum, num_batches_tracked=num_batches_tracked, name="bn",
    )  # fmt: skip


@pytest.mark.untraced
@pytest.mark.world_size(2)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_a_fused_and_masked_layer_compiles_to_the_same_numbers(world_size, act):
    torch.manual_seed(2)
    layer = syncbn.SyncBatchNorm(3, act=act)
    plain = copy.deepcopy(layer)
    x, residual = (own_part(torch.randn(6, 3, 5), SIZES).requires_grad_() for _ in range(2))
    mask = torch.rand(len(x), 1, 5) > 0.3
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(x)
    results = []
    for net in (compiled, plain):
        y = net(x, mask, residual)
        results.append((y, *torch.autograd.grad(y, (x, residual, net.weight, net.bias), dy)))
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected, 1e-5)
    assert_close(layer.running_var, plain.running_var, 1e-6, "running_var")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_fused_on_ranks_is_the_sequence_on_the_whole_batch(world_size, act):
    torch.manual_seed(3)
    whole, residual, dy = (torch.randn(6, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    x, r = whole.clone().requires_grad_(), residual.clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True) + r
    y = y if act is None else getattr(F, act)(y)
    expected = (y, *torch.autograd.grad(y, (x, r), dy))
    own_x, own_r = (own_part(t, SIZES).requires_grad_() for t in (whole, residual))
    own_y = syncbn.sync_batch_norm(own_x, residual=own_r, act=act)
    own = (own_y, *torch.autograd.grad(own_y, (own_x, own_r), own_part(dy, SIZES)))
    for mine, theirs in zip(own, expected, strict=True):
        assert_close(mine, own_part(theirs, SIZES), 1e-11)


@pytest.mark.world_size(2)
def test_a_mask_that_keeps_nothing_of_one_rank_leaves_the_others_statistics(world_size):
    torch.manual_seed(4)
    whole = torch.randn(6, 3, 4, dtype=torch.float64)
    mask = torch.ones(6, 1, 4, dtype=torch.bool)
    mask[2:] = False  # all that rank 1 has
    y = syncbn.sync_batch_norm(own_part(whole, SIZES), mask=own_part(mask, SIZES))
    expected = F.batch_norm(whole[:2], None, None, training=True)
    assert_close(y, expected if dist.get_rank() == 0 else torch.zeros_like(y), 1e-12)


@pytest.mark.untraced
@pytest.mark.world_size(2)
def test_a_layer_compiled_before_there_are_ranks_is_synchronised_once_there_are(world_size):
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    dist.destroy_process_group()
    layer = syncbn.SyncBatchNorm(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 5) + rank
    compiled(x)
    layer.reset_running_stats()
    anew = dist.PrefixStore("anew", store)
    dist.init_process_group("gloo", store=anew, rank=rank, world_size=world_size)
    compiled(x)
    means = [torch.empty(3) for _ in range(world_size)]
    dist.all_gather(means, layer.running_mean)
    assert torch.equal(*means)
