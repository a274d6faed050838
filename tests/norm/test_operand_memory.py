"""Operands whose values are not where, or not what, a kernel would read at their address: right, or refused.

An activation keeps torch's own operation out, so every layer here runs kernels wherever it may.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import syncbn

SHAPE = (4, 3, 5, 5)
PARAMETERS, STATISTICS = ("weight", "bias"), ("running_mean", "running_var")


def _layer(act="silu"):
    layer = syncbn.SyncBatchNorm(3, act=act)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    return layer


def _negated(values):
    """A view with the values of `values`, whose memory holds their negatives."""
    return torch._neg_view(-values.detach())


def _without_memory(values):
    values = values.detach().clone()
    values.untyped_storage().resize_(0)
    return values


def _put(layer, name, values):
    if name in PARAMETERS:
        setattr(layer, name, nn.Parameter(values))
    else:
        layer._buffers[name] = values


def _pass(layer, x, residual, dy):
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = layer(x, residual=residual)
    y.backward(dy)
    gradients = (x.grad, residual.grad, layer.weight.grad, layer.bias.grad)
    return (y, *gradients, layer.running_mean, layer.running_var)


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_a_lazily_negated_view_counts_with_its_own_values(world_size, act):
    usual = {key: torch.randn(SHAPE) for key in ("x", "residual", "dy")}
    for name in (*usual, *PARAMETERS, *STATISTICS):
        layer, operands = _layer(act), dict(usual)
        for values in (*layer.parameters(), *layer.buffers()):
            dist.broadcast(values.data, 0)
        expected = _pass(copy.deepcopy(layer), **operands)
        if name in operands:
            operands[name] = _negated(operands[name])
        else:
            _put(layer, name, _negated(getattr(layer, name)))
        for got, wanted in zip(_pass(layer, **operands), expected, strict=True):
            assert_close(got, wanted, 1e-6, name)


def test_the_imaginary_part_of_a_conjugate_is_normalised_as_its_values_are():
    x = torch.randn(SHAPE, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    layer = _layer()
    assert_close(copy.deepcopy(layer)(x), layer(x.clone()), 1e-6)


@pytest.mark.parametrize("name", ["x", "residual", *PARAMETERS, *STATISTICS])
def test_a_tensor_whose_storage_was_given_back_is_refused(name):
    layer, operands = _layer(), {"x": torch.randn(SHAPE), "residual": torch.randn(SHAPE)}
    if name in operands:
        operands[name] = _without_memory(operands[name])
    else:
        _put(layer, name, _without_memory(getattr(layer, name)))
    with pytest.raises(RuntimeError, match="has no memory: its storage was resized"):
        layer(operands["x"], residual=operands["residual"])


@pytest.mark.parametrize("mode", ["no values", "of another type"])
def test_a_count_of_batches_that_is_no_single_integer_is_left_to_torch(mode):
    layer, count = _layer(), torch.zeros(2, dtype=torch.int64)
    layer._buffers["num_batches_tracked"] = count[:0] if mode == "no values" else count.float()[0]
    layer(torch.randn(SHAPE))
    assert count.tolist() == [0, 0]
    assert layer.num_batches_tracked.sum() == (mode == "of another type")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values[:1],
        lambda values: values.to("meta"),
        lambda values: values.new_zeros(values.numel() + 1),
    ],
    ids=["fewer values", "no values", "one more"],
)
@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("dim", [1, 4], ids=["parameters", "inputs"])
def test_a_saved_tensor_that_comes_back_as_another_is_refused(change, act, dim):
    def unpacked(values):
        return change(values) if values.dim() == dim else values

    layer, x = _layer(act), torch.randn(SHAPE, requires_grad=True)
    with saved_tensors_hooks(lambda values: values, unpacked):
        y = layer(x, residual=torch.randn(SHAPE))
    with pytest.raises(ValueError, match=r"SyncBatchNorm\(3\): expected .* on .*, got "):
        y.sum().backward()


@pytest.mark.world_size(2)
def test_all_ranks_hear_of_a_gradient_that_a_hook_cut_on_one(world_size):
    def cut(dy):
        dy.data = dy.data[:1]

    y = _layer()(torch.randn(SHAPE, requires_grad=True))
    if dist.get_rank() == 0:
        y.register_hook(cut)
        error, message = ValueError, r"expected shape \(4, 3, 5, 5\) on cpu, got \(1, 3, 5, 5\)"
    else:
        error, message = syncbn.RanksDisagree, r"rank 0 failed in .*expected shape \(4, 3, 5, 5\)"
    with pytest.raises(error, match=message):
        y.clone().backward(torch.randn(SHAPE))
    dist.barrier()


def test_a_gradient_whose_dtype_a_hook_changed_in_place_is_read_in_its_own():
    def widened(dy):
        dy.data = dy.data.double()

    layer, x, dy = _layer(), torch.randn(SHAPE), torch.randn(SHAPE)
    gradients = []
    for hook in (None, widened):
        one = x.clone().requires_grad_()
        y = layer(one)
        if hook is not None:
            y.register_hook(hook)
        y.clone().backward(dy)
        gradients.append(one.grad)
    assert_close(*gradients, 1e-6)


class _SparseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_sparse()


@pytest.mark.world_size(1, 2)
def test_a_sparse_gradient_counts_as_its_values(world_size):
    layer, x, dy = _layer(), torch.randn(SHAPE), torch.randn(SHAPE)
    gradients = []
    for after in (torch.clone, _SparseGradient.apply):
        one = x.clone().requires_grad_()
        after(layer(one)).backward(dy)
        gradients.append(one.grad)
    assert_close(*gradients, 1e-6)


def test_running_statistics_of_inference_mode_are_moved_by_torch():
    layer, twin = _layer(), _layer()
    with torch.inference_mode():
        for name in STATISTICS:
            layer._buffers[name] = getattr(twin, name).clone()
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        layer(x)
    twin(x)
    for name in STATISTICS:
        assert_close(getattr(layer, name), getattr(twin, name), 1e-6)


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.bfloat16, torch.Tensor.double, _negated],
    ids=["half", "double", "negated"],
)
@pytest.mark.parametrize(("act", "saved"), [("relu", "output"), ("silu", "residual")])
def test_what_backward_needs_beside_x_counts_with_its_values_when_a_hook_changed_it(
    change, act, saved
):
    def pack(values):
        return values, values.dim() == 4 and values.data_ptr() != x.data_ptr()

    def unpack(packed):
        values, is_changed = packed
        return change(values) if is_changed else values

    x, residual, dy = torch.randn(3, *SHAPE)
    x, layer = x.clone(), _layer(act)
    expected = _pass(copy.deepcopy(layer), x, residual, dy)
    with saved_tensors_hooks(pack, unpack):
        got = _pass(layer, x, residual, dy)
    for mine, wanted in zip(got[1:5], expected[1:5], strict=True):
        assert_close(mine, wanted, 0.03 if change is torch.Tensor.bfloat16 else 1e-5)


@pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
def test_a_weight_that_is_no_vector_is_refused_before_it_is_used(with_mask):
    mask = torch.ones(4, 1, dtype=torch.bool) if with_mask else None
    with pytest.raises(ValueError, match=r"each of 3 channels on cpu, got \(3, 1\)"):
        syncbn.sync_batch_norm(torch.randn(4, 3), weight=torch.randn(3, 1), mask=mask)
