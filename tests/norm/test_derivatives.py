"""Derivatives across ranks: numeric checks of first and second order, with every rank moving in step.

The checks see one function of the whole batch, held by all ranks alike. The wrappers below turn it into a rank's part
and back; each is differentiable twice because its gradient is another of them.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, batch_norm, own_part
from torch.autograd import Function

import syncbn

pytestmark = pytest.mark.untraced
SIZES = {2: (2, 1), 3: (2, 0, 1)}


def gathered(part):
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(part.shape[0]))
    parts = [part.new_empty(int(n), *part.shape[1:]) for n in sizes]
    for rank, buffer in enumerate(parts):
        buffer.copy_(part) if rank == dist.get_rank() else None
        dist.broadcast(buffer, rank)
    return torch.cat(parts), [int(n) for n in sizes]


class Own(Function):
    """The whole batch to this rank's part of it."""

    @staticmethod
    def forward(ctx, whole, sizes):
        ctx.sizes = sizes
        return own_part(whole, sizes)

    @staticmethod
    def backward(ctx, gradient):
        return Everyones.apply(gradient, ctx.sizes), None


class Everyones(Function):
    """Every rank's part to the whole batch."""

    @staticmethod
    def forward(ctx, part, sizes):
        ctx.sizes = sizes
        return gathered(part)[0]

    @staticmethod
    def backward(ctx, gradient):
        return Own.apply(gradient, ctx.sizes), None


class Copy(Function):
    """A parameter that all ranks hold; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, parameter):
        return parameter.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Sum.apply(gradient)


class Sum(Function):
    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return Copy.apply(gradient)


def _layer_of_the_whole(sizes, act, mask):
    def layer(x, weight, bias, residual):
        y = syncbn.sync_batch_norm(
            Own.apply(x, sizes),
            None,
            None,
            Copy.apply(weight),
            Copy.apply(bias),
            residual=Own.apply(residual, sizes),
            act=act,
            mask=None if mask is None else own_part(mask, sizes),
        )
        return Everyones.apply(y, sizes)

    return layer


@pytest.mark.slow_if(lambda act, with_mask, **_: with_mask != (act is None))
@pytest.mark.world_size(2)
@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
def test_first_and_second_derivatives_pass_the_numeric_checks(world_size, act, with_mask):
    _check_derivatives(world_size, act, with_mask)


@pytest.mark.world_size(3)
def test_derivatives_pass_the_numeric_checks_with_an_empty_rank(world_size):
    _check_derivatives(world_size, "silu", with_mask=True)


def _check_derivatives(world_size, act, with_mask):
    sizes = SIZES[world_size]
    torch.manual_seed(7)
    shape = (sum(sizes), 2, 2)
    x, residual, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape, 2, 2)
    )
    mask = torch.rand(sum(sizes), 1, 2) > 0.3 if with_mask else None
    layer = _layer_of_the_whole(sizes, act, mask)
    inputs = (x, weight, bias, residual)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.world_size(2)
def test_a_gradient_penalty_is_that_of_one_big_batch(world_size):
    torch.manual_seed(1)
    whole = torch.randn(6, 3, 4, dtype=torch.float64)
    layer = batch_norm(3, 3).double()
    oracle = copy.deepcopy(layer)
    sync = syncbn.convert_sync_batchnorm(layer)

    def penalty(norm, x):
        (slope,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        return slope.square().sum()

    x = whole.clone().requires_grad_()
    penalty(oracle, x).backward()
    part = own_part(whole, (2, 4)).requires_grad_()
    penalty(sync, part).backward()
    assert_close(part.grad, own_part(x.grad, (2, 4)), 1e-9, "input")
    summed = sync.weight.grad.clone()
    dist.all_reduce(summed)
    assert_close(summed, oracle.weight.grad, 1e-9, "weight")


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_what_a_mask_leaves_out_reaches_no_derivative(world_size, act):
    """NaN there, as in padding that was never written, leaves every gradient of any order as zeros do."""
    mask = torch.rand(4, 1, 5) > 0.3
    mask[0, 0, 0] = False
    values = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    found = []
    for filled in (0.0, float("nan")):
        layer = syncbn.SyncBatchNorm(3, act=act, dtype=torch.float64)
        x, residual, dy = (v.masked_fill(~mask, filled).requires_grad_() for v in values)
        operands = (x, residual, layer.weight, layer.bias)
        y = layer(x, mask, residual)
        plain = torch.autograd.grad(y, operands, dy, retain_graph=True)
        batched = torch.autograd.grad(
            y, operands, dy.expand(2, *dy.shape), retain_graph=True, is_grads_batched=True
        )
        first = torch.autograd.grad(y, operands, dy, create_graph=True)
        total = sum((gradient**2).sum() for gradient in first)
        second = torch.autograd.grad(total, (*operands, dy), allow_unused=True)
        found.append([*plain, *batched, *first, *(one for one in second if one is not None)])
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected, 1e-12)
