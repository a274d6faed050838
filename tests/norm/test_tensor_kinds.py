"""Tensors that are more than a torch.Tensor, and what writes over the layer's output: as with torch's batch norm."""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, batch_norm
from torch import nn
from torch.nn import functional as F  # noqa: N812

import syncbn
from syncbn.norm.backends.activations import ACTIVATIONS

SHAPES = [(4, 3, 5, 5), (8, 64, 56, 56)]
"""One that torch's own operation serves alone, and one that the layer's kernels serve."""
ACTS = [None, *ACTIVATIONS]


class Annotated(torch.Tensor):
    """A tensor that carries a note through every operation, as MONAI's MetaTensor carries its affine matrix."""

    note = None

    @staticmethod
    def of(values, note):
        tensor = values.as_subclass(Annotated)
        tensor.note = note
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        notes = [arg.note for arg in args if isinstance(arg, Annotated) and arg.note]
        if notes and isinstance(result, Annotated):
            result.note = notes[0]
        return result


def _plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


def _gradients(layer, x, dy, *operands):
    x = x.detach().requires_grad_()
    y = layer(x, *operands)
    y.backward(dy)
    return y, x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [None, "relu"])
def test_a_subclass_keeps_its_class_and_attributes(shape, training, act):
    layer = syncbn.SyncBatchNorm(shape[1], act=act).train(training)
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(shape), torch.randn(shape)
    y, *gradients = _gradients(layer, Annotated.of(x, "CT"), dy)
    expected, *expected_gradients = _gradients(twin, x, dy)
    assert type(y) is Annotated
    assert y.note == "CT"
    assert_close(_plain(y), expected, 1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert type(mine) is torch.Tensor
        assert_close(mine, theirs, 1e-5)
    for name, buffer in layer.named_buffers():
        assert type(buffer) is torch.Tensor
        assert_close(buffer.float(), twin.get_buffer(name).float(), 1e-5, name)


def test_masks_and_residuals_of_a_subclass_are_taken():
    layer = syncbn.SyncBatchNorm(3, act="silu")
    twin = copy.deepcopy(layer)
    x, residual, dy = (torch.randn(4, 3, 5) for _ in range(3))
    mask = torch.rand(4, 1, 5) > 0.3
    operands = (Annotated.of(mask, "mask"), Annotated.of(residual, "MR"))
    y, *gradients = _gradients(layer, Annotated.of(x, "CT"), dy, *operands)
    expected = _gradients(twin, x, dy, mask, residual)
    for mine, theirs in zip((y, *gradients), expected, strict=True):
        assert_close(_plain(mine), theirs, 1e-5)
    assert y.note == "CT"


@pytest.mark.world_size(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_subclass_is_synchronised_as_a_plain_tensor_is(world_size, shape):
    torch.manual_seed(dist.get_rank())
    layer = syncbn.convert_sync_batchnorm(batch_norm(shape[1]))
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(shape), torch.randn(shape)
    y, *gradients = _gradients(layer, Annotated.of(x, "CT"), dy)
    expected, *expected_gradients = _gradients(twin, x, dy)
    assert type(y) is Annotated
    assert y.note == "CT"
    assert_close(_plain(y), expected, 1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert type(mine) is torch.Tensor
        assert_close(mine, theirs, 1e-5)
    assert type(layer.running_var) is torch.Tensor


def test_populations_of_a_subclass_are_those_of_its_values():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(8, 3)
    syncbn.recalibrate(model, [Annotated.of(x, "CT")])
    assert type(model[0].running_mean) is torch.Tensor
    assert_close(model[0].running_mean, x.mean(0), 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_an_activation_in_place_behind_the_layer_gives_the_gradients_of_one_out_of_place(
    shape, with_residual
):
    layer = syncbn.SyncBatchNorm(shape[1])
    twin = copy.deepcopy(layer)
    x, residual, dy = (torch.randn(shape) for _ in range(3))
    operands = (None, residual) * with_residual
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = F.relu(layer(mine, *operands), inplace=True), F.relu(twin(theirs, *operands))
    for result in (y, expected):
        result.backward(dy)
    assert torch.equal(y, expected)
    assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(layer.weight.grad, twin.weight.grad)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_activation_in_place_on_ranks_gives_what_the_fused_one_does(world_size, shape):
    torch.manual_seed(dist.get_rank())
    x, dy = torch.randn(shape), torch.randn(shape)
    behind = nn.Sequential(syncbn.SyncBatchNorm(shape[1]), nn.ReLU(inplace=True))
    fused = syncbn.SyncBatchNorm(shape[1], act="relu")
    results = []
    for model in (behind, fused):
        own = x.clone().requires_grad_()
        y = model(own)
        y.backward(dy)
        results.append((y, own.grad, *(parameter.grad for parameter in model.parameters())))
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_a_write_into_the_output_of_a_fused_layer_never_gives_wrong_gradients(act, with_residual):
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(6, 3, 4) for _ in range(3))
    operands = {"residual": residual} if with_residual else {}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    z = F.batch_norm(theirs, None, None, training=True) + (residual if with_residual else 0)
    y = z if act is None else getattr(F, act)(z)
    (y * 2).backward(dy)
    y = syncbn.SyncBatchNorm(3, act=act)(ours, **operands).mul_(2)
    if with_residual and act is not None and ACTIVATIONS[act].from_output:
        # backward reads the output: autograd refuses, as it does after torch's own relu
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)
    else:
        y.backward(dy)
        assert_close(ours.grad, theirs.grad, 1e-5)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_hooks_that_give_saved_tensors_back_in_another_dtype_leave_the_gradients_right(dtype, act):
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm(3, act=act)
    x, residual, dy = torch.randn(3, 4, 3, 5, 5).unbind()
    gradients = []
    for other in (torch.float32, dtype):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        unpack = lambda t: t.to(other) if t.dtype == torch.float32 else t  # noqa: E731, B023
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = layer(leaves[0], residual=leaves[1])
        gradients.append(torch.autograd.grad(y, leaves, dy))
    rounding = 1e-5 if dtype == torch.float64 else 0.05
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_parameter_or_statistic_on_another_device_is_refused(name):
    layer = syncbn.SyncBatchNorm(3, act="relu")
    value = getattr(layer, name).to("meta")
    setattr(layer, name, torch.nn.Parameter(value) if "running" not in name else value)
    with pytest.raises(ValueError, match=r"on cpu, got \(3,\) on meta"):
        layer(torch.randn(4, 3, 5, 5))
