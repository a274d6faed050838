"""Batches of gradients (vectorised jacobians, vmap over the backward pass), and transforms of torch.func."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import syncbn

SIZES = (3, 200)
"""Edges of planes: below and above the size from which a layer alone uses kernels of ours."""
FUSED = {
    "plain": {},
    "act": {"act": "silu"},
    "residual": {"act": "relu", "residual": True},
    "mask": {"mask": True},
}
each_size = pytest.mark.parametrize("size", SIZES)
each_fused = pytest.mark.parametrize("fused", FUSED)


def _layer_and_operands(size, fused):
    torch.manual_seed(1)
    options = dict(FUSED[fused])
    x = torch.randn(2, 4, size, size, dtype=torch.float64).requires_grad_()
    given = {}
    if options.pop("residual", False):
        given["residual"] = torch.randn_like(x)
    if options.pop("mask", False):
        given["mask"] = torch.rand(2, 1, size, size) < 0.7
    return syncbn.SyncBatchNorm(4, dtype=torch.float64, **options), x, given


def _check_batched(size, fused):
    layer, x, given = _layer_and_operands(size, fused)
    inputs = [x, layer.weight, layer.bias]
    y = layer(x, **given)
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, inputs, dys, retain_graph=True, is_grads_batched=True)
    mapped = vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys)
    each = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    for ours, theirs, *singles in zip(batched, mapped, *each, strict=True):
        expected = torch.stack(singles)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(theirs, expected, rtol=1e-9, atol=1e-9)


@each_size
@each_fused
def test_a_batch_of_gradients_gives_what_each_gives_alone(size, fused):
    _check_batched(size, fused)


@pytest.mark.world_size(2)
@each_fused
def test_a_batch_of_gradients_gives_what_each_gives_on_ranks(fused, world_size):
    _check_batched(3, fused)


@pytest.mark.world_size(2)
def test_a_vectorised_jacobian_is_that_of_one_process(world_size):
    torch.manual_seed(0)
    whole = torch.randn(4, 2, dtype=torch.float64)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    layer = syncbn.SyncBatchNorm(2, dtype=torch.float64)
    # the other rank's outputs follow this rank's inputs too: a sum over outputs of all ranks is what backward gives
    jacobian = torch.autograd.functional.jacobian(layer, whole[own], vectorize=True)
    reference = nn.BatchNorm1d(2).double()
    expected = torch.autograd.functional.jacobian(reference, whole)
    # (outputs of rank r, inputs of this rank), added over ranks, output by output
    blocks = sum(expected[2 * r : 2 * r + 2, :, own] for r in range(2))
    torch.testing.assert_close(jacobian, blocks, rtol=1e-9, atol=1e-9)


@each_size
@pytest.mark.parametrize("fused", ["plain", "act", "residual"])
def test_transforms_of_torch_func_take_a_layer_alone(size, fused):
    layer, x, given = _layer_and_operands(size, fused)
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return functional_call(layer, parameters, (x,), given).square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for ours, theirs in zip(grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("transform", [grad, vmap])
def test_transforms_of_torch_func_are_refused_on_ranks_by_one_sentence(transform, world_size):
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 5, 3)
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm\(3\): torch\.func transforms"):
        transform(lambda x: layer(x.view(-1, 3)).sum())(x)
    assert layer(x[0]).shape == (5, 3)  # no rank waits for another


@pytest.mark.world_size(2)
def test_forward_mode_derivatives_are_refused_on_ranks(world_size):
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        jvp(layer, (x,), (x,))


def test_a_mask_is_refused_under_a_transform():
    layer, mask = syncbn.SyncBatchNorm(3), torch.ones(5, 1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="takes a mask"):
        grad(lambda x: layer(x, mask=mask).sum())(torch.randn(5, 3))
