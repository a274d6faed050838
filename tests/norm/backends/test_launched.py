"""Passes of few launches, as on a GPU: the layer over Triton's kernels, which an interpreter runs on the CPU."""

import importlib.util
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, batch_norm, own_part
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import hardswish, leaky_relu, relu, relu6, silu
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.norm.backends import selected

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves"),
    pytest.mark.triton_interpreter,
]
LAYOUTS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = {2: [5, 2], 3: [3, 0, 4]}
ACTS = {
    "relu": relu,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "silu": silu,
    "hardswish": hardswish,
}


@contextmanager
def launches():
    """The kernels of Triton serve the CPU; the names of those launched, as they are."""
    from syncbn.norm.backends.triton import backend as module

    names, launch = [], module.launch

    def note(kernel, *arguments):
        names.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *arguments)

    os.environ["SYNCBN_KERNELS"] = "triton"
    selected.cache_clear()
    module.launch = note
    try:
        yield names
    finally:
        module.launch = launch
        del os.environ["SYNCBN_KERNELS"]
        selected.cache_clear()


def _layers(channels, dims=4, **options):
    layer = batch_norm(channels, dims, **options).double()
    return syncbn.convert_sync_batchnorm(batch_norm(channels, dims, **options).double()), layer


@pytest.mark.slow_if(lambda world_size, layout, **_: (world_size == 2) != (layout == "planes"))
@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("act", "shape", "masked", "momentum"),
    [(None, (6, 5, 4), False, 0.3)]
    + [pytest.param(act, (6, 5, 4), False, 0.3, marks=pytest.mark.untraced) for act in ACTS]
    + [
        pytest.param(act, (8, 4, 4), False, 0.3, marks=pytest.mark.untraced)
        for act in ("relu", "relu6", "leaky_relu")
    ]
    + [
        (None, (6, 5, 4), True, 0.3),
        ("relu", (8, 4, 4), True, None),
        (None, (6, 5, 4), False, None),
    ],
)
def test_ranks_give_the_numbers_of_one(world_size, layout, act, shape, masked, momentum):
    generator = torch.Generator().manual_seed(0)
    whole, residual, dy = (
        torch.randn(7, *shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.rand(7, 1, *shape[1:], generator=generator) < (0.6 if masked else 2)
    ours, oracle = _layers(shape[0], momentum=momentum)
    ours.act = act
    expected_x, expected_residual = (t.clone().requires_grad_() for t in (whole, residual))
    kept = mask.expand_as(whole).transpose(0, 1).flatten(1)[0]
    values = expected_x.transpose(0, 1).flatten(1)[:, kept]
    normalised = torch.zeros_like(expected_x).transpose(0, 1).flatten(1)
    normalised = normalised.masked_scatter(
        kept.expand_as(normalised), oracle(values.t()[..., None, None]).squeeze().t()
    )
    z = normalised.view(shape[0], 7, *shape[1:]).transpose(0, 1) + expected_residual
    y = (z if act is None else ACTS[act](z)).masked_fill(~mask, 0)
    y.backward(dy)

    sizes = SIZES[world_size]
    memory_format = LAYOUTS[layout]
    x, r, g = (own_part(t, sizes).to(memory_format=memory_format) for t in (whole, residual, dy))
    x, r = x.requires_grad_(), r.requires_grad_()
    with launches() as names:
        own = ours(x, mask=own_part(mask, sizes) if masked else None, residual=r)
        forward = len(names)
        own.backward(g)
    if len(x):
        assert set(names[:forward]) <= {"moments", "combine_moments", "finish_forward", "update"}
        assert names.count("finish_forward") == 1
        assert set(names[forward:]) <= {"grad_sums", "add_rows", "finish_backward"}
        assert names.count("grad_sums") == names.count("finish_backward") == 1
    assert_close(own, own_part(y, sizes), 1e-10, "output")
    assert_close(x.grad, own_part(expected_x.grad, sizes), 1e-10, "input gradient")
    assert_close(r.grad, own_part(expected_residual.grad, sizes), 1e-10, "residual's gradient")
    for name, buffer in oracle.named_buffers():
        assert_close(getattr(ours, name).double(), buffer.double(), 1e-12, name)
    for name, parameter in oracle.named_parameters():
        gradient = getattr(ours, name).grad
        dist.all_reduce(gradient)
        assert_close(gradient, parameter.grad, 1e-10, name)


VIEWS = {
    "sequence": lambda: torch.randn(4, 9, 8).transpose(1, 2),
    "transposed": lambda: torch.randn(8, 6).t(),
    "images behind channels": lambda: torch.randn(8, 3, 4, 4).transpose(0, 1),
    "channels of channels_last": lambda: _last(torch.randn(3, 16, 4, 4))[:, :8],
    "channels_last": lambda: _last(torch.randn(3, 8, 3, 3)),
    "expanded": lambda: torch.randn(1, 8, 4, 4).expand(3, 8, 4, 4),
}


def _last(x):
    return x.to(memory_format=torch.channels_last)


@contextmanager
def _saved_tensors_come_back_contiguous():
    with saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        yield


@pytest.mark.world_size(1)
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_a_gradient_in_another_dtype_is_taken_where_the_output_is_kept_as_bits(world_size, act):
    def widened(dy):
        dy.data = dy.data.double()

    x, residual, dy = torch.randn(3, 3, 8, 4, 4).unbind()
    gradients = []
    for hook in (None, widened):
        operands = [values.clone().requires_grad_() for values in (x, residual)]
        with launches() as names:
            y = syncbn.SyncBatchNorm(8, act=act)(operands[0], residual=operands[1])
            if hook is not None:
                y.register_hook(hook)
            y.clone().backward(dy)
        assert ("finish_backward" in names) is (hook is None)
        gradients.append([values.grad for values in operands])
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, 1e-6)


@pytest.mark.untraced
@pytest.mark.world_size(1)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("act", "around"),
    [
        ("relu", nullcontext),
        ("silu", nullcontext),
        ("relu", _saved_tensors_come_back_contiguous),
    ],
)
def test_inputs_of_any_strides_get_their_gradients(world_size, view, act, around):
    torch.manual_seed(0)
    whole = VIEWS[view]().double()
    residual, dy, ddx = (torch.randn_like(whole) for _ in range(3))
    ours, oracle = _layers(8, whole.dim())
    ours.act = act
    found = []
    for layer in (ours, oracle):
        x, r, g = (
            t.detach().clone(memory_format=torch.preserve_format) for t in (whole, residual, dy)
        )
        if view == "expanded":
            x = whole.detach()
        x, r, g = x.requires_grad_(), r.requires_grad_(), g.requires_grad_()
        with launches() if layer is ours else nullcontext(), around():
            y = ours(x, residual=r) if layer is ours else ACTS[act](oracle(x) + r)
            first = torch.autograd.grad(y, [x, r], g, retain_graph=True)
            dx, dr = torch.autograd.grad(y, [x, r], g, create_graph=True)
            second = torch.autograd.grad((dx * ddx).sum(), [x, g])
        found.append([y, *first, dx, dr, *second])
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, 1e-9)


@pytest.mark.world_size(1)
def test_a_mask_that_leaves_one_value_changes_nothing(world_size):
    ours = syncbn.SyncBatchNorm(3)
    mask = torch.zeros(2, 1, 4, dtype=torch.bool)
    mask[0, 0, 2] = True
    with launches(), pytest.raises(ValueError, match="more than 1 value"):
        ours(torch.randn(2, 3, 4), mask=mask)
    assert ours.num_batches_tracked == 0
    assert torch.equal(ours.running_mean, torch.zeros(3))


@pytest.mark.world_size(2)
def test_a_replay_counts_nothing_and_repeats_the_numbers(world_size):
    x = torch.randn(4, 6, 5, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    layers = [syncbn.SyncBatchNorm(6) for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in layers]
    dy = torch.randn(4, 6, 5, 4)
    with launches() as names:
        layers[0](inputs[0]).backward(dy)
        names.clear()
        checkpoint(layers[1], inputs[1], use_reentrant=False).backward(dy)
    assert names.count("moments") == names.count("finish_forward") == 1
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for name, buffer in layers[0].named_buffers():
        assert torch.equal(buffer, getattr(layers[1], name)), name


@pytest.mark.world_size(1)
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu"])
def test_second_derivatives_are_those_of_differences(world_size, act):
    generator = torch.Generator().manual_seed(1)
    x, residual = (
        torch.randn(3, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    ours = syncbn.SyncBatchNorm(8, act=act).double()

    def layer(x, residual):
        return ours(x, residual=residual)

    with launches():
        assert gradcheck(layer, (x, residual), fast_mode=True)
        assert gradgradcheck(layer, (x, residual), fast_mode=True)


@pytest.mark.world_size(1)
def test_what_follows_the_exchange_has_the_bits_of_a_rank_without_samples(world_size):
    from syncbn.norm.backends.base import NormArgs, Running
    from syncbn.norm.backends.triton.backend import TritonBackend

    backend = TritonBackend()
    x, residual = torch.randn(5, 70, 3, 4) * 3 + 2, torch.randn(5, 70, 3, 4)
    args = NormArgs(x, *torch.randn(2, 70), residual, act="relu")
    gathered = torch.stack([backend.local_stats(NormArgs(part)) for part in x.split([1, 3, 1])])
    one, other = (Running(torch.ones(70), torch.ones(70), torch.tensor(3), 0.1) for _ in range(2))
    y, stats = backend.finish_forward(args._replace(running=one), gathered)
    _, expected = backend.finish_forward(NormArgs(x[:0], running=other), gathered)
    assert torch.equal(y, backend.normalize(args, expected))
    for ours, theirs in zip((*stats, *one[:3]), (*expected, *other[:3]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("channels_last", [False, True], ids=LAYOUTS)
def test_many_programs_may_share_a_channel(world_size, channels_last):
    import kernel_suite as suite

    from syncbn.norm.backends.triton import tile_plan
    from syncbn.norm.backends.triton.backend import TritonBackend

    real = tile_plan.num_multiprocessors
    tile_plan.num_multiprocessors = lambda device: 4
    tile_plan._geometry.cache_clear()
    try:
        case = suite.Case((12, 5, 9, 11), channels_last=channels_last, act="relu")
        geometry = tile_plan.geometry_of(suite.forward_inputs(case).args.x)
        assert geometry.reduction.grid[1] > 4
        suite.check_local_stats(TritonBackend(), case)
        suite.check_backward(TritonBackend(), case)
    finally:
        tile_plan.num_multiprocessors = real
        tile_plan._geometry.cache_clear()
