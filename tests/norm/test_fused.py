"""Activation, residual and mask inside the layer: the numbers of the sequence without fusing, and of packed samples."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from oracle import assert_close
from torch import nn

import syncbn
from syncbn.norm.backends.activations import ACTIVATIONS

ACTS = [None, *ACTIVATIONS]


def leaves(*shapes, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def unfused(x, weight, bias, act, residual):
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    y = y if residual is None else y + residual
    return y if act is None else getattr(F, act)(y)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ACTS)
def test_fused_is_the_sequence_it_stands_for(act, with_residual):
    x, residual, weight, bias = leaves((6, 3, 4, 2), (6, 3, 4, 2), (3,), (3,))
    inputs = [x, weight, bias] + [residual] * with_residual
    added = residual if with_residual else None
    dy = torch.randn_like(x)
    ours = syncbn.sync_batch_norm(x, None, None, weight, bias, residual=added, act=act)
    theirs = unfused(x, weight, bias, act, added)
    assert_close(ours, theirs, 1e-12, "output")
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        assert_close(mine, expected, 1e-11, "gradient")


@pytest.mark.slow_if(lambda with_residual, with_mask, **_: with_residual != with_mask)
@pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ACTS)
def test_first_and_second_derivatives_pass_the_numeric_checks(act, with_residual, with_mask):
    x, residual, weight, bias = leaves((4, 2, 3), (4, 2, 3), (2,), (2,), seed=3)
    mask = torch.rand(4, 1, 3) > 0.3 if with_mask else None

    def layer(x, weight, bias, residual=None):
        return syncbn.sync_batch_norm(
            x, None, None, weight, bias, residual=residual, mask=mask, act=act
        )

    inputs = (x, weight, bias) + (residual,) * with_residual
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
def test_derivatives_without_all_parameters(parameters):
    x, given = leaves((5, 2, 3), (2,))
    names = {"weight": "weight", "bias": "bias"}.get(parameters)

    def layer(x, *given):
        return syncbn.sync_batch_norm(x, act="silu", **({names: given[0]} if names else {}))

    inputs = (x, given) if names else (x,)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_what_the_mask_leaves_out_has_no_part_in_anything():
    x, weight, bias = leaves((6, 3, 5), (3,), (3,))
    mask = torch.rand(6, 1, 5) > 0.4
    kept = mask.expand_as(x)
    dy = torch.randn_like(x)
    spoilt = torch.where(kept, x.detach(), torch.nan).requires_grad_()
    running = torch.zeros(3).double(), torch.ones(3).double()
    y = syncbn.sync_batch_norm(spoilt, *running, weight, bias, mask=mask, momentum=1.0)
    grads = torch.autograd.grad(y, (spoilt, weight, bias), dy)

    packed = x.detach().transpose(1, 2)[mask[:, 0]].requires_grad_()  # (values, C)
    oracle = nn.BatchNorm1d(3, momentum=1.0).double()
    oracle.load_state_dict(
        {"weight": weight.detach(), "bias": bias.detach()} | dict(oracle.named_buffers())
    )
    expected = oracle(packed)
    inputs = (packed, oracle.weight, oracle.bias)
    expected_grads = torch.autograd.grad(expected, inputs, dy.transpose(1, 2)[mask[:, 0]])
    assert_close(y.transpose(1, 2)[mask[:, 0]], expected, 1e-12, "output")
    assert_close(grads[0].transpose(1, 2)[mask[:, 0]], expected_grads[0], 1e-11, "dx")
    assert_close(grads[1], expected_grads[1], 1e-11, "dweight")
    assert_close(grads[2], expected_grads[2], 1e-11, "dbias")
    assert_close(running[1], oracle.running_var, 1e-12, "running_var")
    assert not y[~kept].any()
    assert not grads[0][~kept].any()


@pytest.mark.parametrize("masked", [False, True])
def test_nan_on_a_rank_alone_reaches_the_statistics_of_its_channel(masked):
    x = torch.randn(6, 3, 5)
    x[1, 0, 2] = torch.nan
    mask = torch.ones(6, 1, 5, dtype=torch.bool) if masked else None
    mean, var, tracked = torch.zeros(3), torch.ones(3), torch.tensor(0)
    syncbn.sync_batch_norm(x, mean, var, mask=mask, num_batches_tracked=tracked)
    oracle = nn.BatchNorm1d(3)
    oracle(x)
    assert tracked == 1
    torch.testing.assert_close(mean, oracle.running_mean, equal_nan=True)
    torch.testing.assert_close(var, oracle.running_var, equal_nan=True)


def test_a_mask_broadcasts_over_positions():
    (x,) = leaves((4, 3, 5))
    mask = torch.tensor([True, True, False, True]).view(4, 1, 1)
    y = syncbn.sync_batch_norm(x, mask=mask)
    assert_close(y[mask.view(4)], syncbn.sync_batch_norm(x[mask.view(4)]), 1e-12)


@pytest.mark.parametrize("act", ACTS)
def test_evaluation_does_the_same_with_running_statistics(act):
    layer = syncbn.SyncBatchNorm(3, act=act).eval()
    layer.running_mean.normal_()
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    mask = torch.rand(4, 1, 5) > 0.5
    plain = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    expected = plain + residual
    expected = expected if act is None else getattr(F, act)(expected)
    assert torch.equal(layer(x, residual=residual), expected)
    assert torch.equal(layer(x, mask, residual), expected.masked_fill(~mask, 0))


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ({"mask": torch.ones(4, 1, 6, dtype=torch.bool)}, ValueError, r"expands to \(4, 1, 5\)"),
        ({"mask": torch.ones(4, 3, 5, dtype=torch.bool)}, ValueError, r"got \(4, 3, 5\)"),
        ({"mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, r"got \(4, 1\)"),
        ({"mask": torch.ones(4, 1, 5)}, TypeError, "torch.bool, got torch.float32"),
        ({"residual": torch.ones(4, 3)}, ValueError, r"residual of shape \(4, 3, 5\)"),
        ({"residual": torch.ones(4, 3, 5).to_sparse()}, TypeError, "expected a dense residual"),
        ({"residual": torch.ones(4, 3, 5, device="meta")}, ValueError, "residual on cpu, got meta"),
        ({"mask": torch.ones(4, 1, 5, device="meta") > 0}, ValueError, "mask on cpu, got meta"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_named(operands, error, message):
    with pytest.raises(error, match=message):
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3, 5), **operands)


def test_an_unknown_activation_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="act='rleu' is not allowed: None or one of 'relu'"):
        syncbn.SyncBatchNorm(3, act="rleu")


def test_fusing_keeps_less_for_backward():
    def saved(function):
        kept = {}

        def note(tensor):
            kept[tensor.data_ptr()] = tensor.numel() if tensor.dim() > 1 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            function(x * 1, residual * 1)
        return sum(kept.values()) / x.numel()

    x, residual = (torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(2))
    layer = nn.BatchNorm2d(3)
    fused = {act: syncbn.SyncBatchNorm(3, act=act) for act in ("relu", "silu")}
    assert saved(lambda x, r: fused["relu"](x)) == 1  # x; torch keeps x and y
    assert saved(lambda x, r: F.relu(layer(x))) == 2
    assert saved(lambda x, r: fused["silu"](x, residual=r)) == 2  # x and the residual
    assert saved(lambda x, r: F.silu(layer(x) + r)) == 2
    assert saved(lambda x, r: fused["relu"](x, residual=r)) == 2  # x and y


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("wanted", [[1], [1, 2], [0], [2], [0, 1]], ids=str)
def test_gradients_are_the_same_whichever_of_them_are_wanted(act, wanted):
    x, residual, weight = leaves((6, 3, 4, 2), (6, 3, 4, 2), (3,))
    operands = (x, residual, weight)
    y = syncbn.sync_batch_norm(x, None, None, weight, residual=residual, act=act)
    dy = torch.randn(y.shape, dtype=y.dtype)
    expected = torch.autograd.grad(y, operands, dy)
    some = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(operands)]
    y = syncbn.sync_batch_norm(some[0], None, None, some[2], residual=some[1], act=act)
    gradients = torch.autograd.grad(y, [some[n] for n in wanted], dy)
    for n, gradient in zip(wanted, gradients, strict=True):
        assert_close(gradient, expected[n], 1e-12)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_what_a_mask_leaves_out_in_evaluation_may_be_nan(act, with_residual):
    layer = syncbn.SyncBatchNorm(3, act=act).eval()
    x, residual = torch.randn(2, 4, 3, 5)
    mask = torch.rand(4, 1, 5) > 0.5
    results = []
    for left_out in (0.0, torch.nan):
        operands = [t.masked_fill(~mask, left_out).requires_grad_() for t in (x, residual)]
        inputs = [operands[0], *layer.parameters()] + operands[1:] * with_residual
        y = layer(operands[0], mask, operands[1] if with_residual else None)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for mine, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("act", [None, "relu"])
def test_evaluation_without_running_statistics_normalises_with_what_a_mask_keeps(act):
    layer = syncbn.SyncBatchNorm(3, act=act, track_running_stats=False)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 1, 5) > 0.3
    x = x.masked_fill(~mask, torch.nan)
    results = []
    for training in (True, False):
        leaf = x.clone().requires_grad_()
        y = layer.train(training)(leaf, mask)
        results.append((y, *torch.autograd.grad(y.pow(3).sum(), [leaf, *layer.parameters()])))
    for mine, expected in zip(results[1], results[0], strict=True):
        assert_close(mine, expected, 1e-5)
