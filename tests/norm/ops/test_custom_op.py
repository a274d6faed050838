"""The operators that torch.compile sees: what the compiler is told of them is true for every layout."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.norm.ops import custom_op

LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 5, 3),
    "channels_last": lambda: _last(torch.randn(4, 6, 5, 3)),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "sequence": lambda: torch.randn(4, 7, 6).transpose(1, 2),
    "transposed": lambda: torch.randn(6, 8).t(),
    "permuted": lambda: torch.randn(6, 5, 4, 3).permute(2, 0, 3, 1),
    "sliced": lambda: torch.randn(4, 12, 5, 6)[:, 1::2, :, ::2],
    "sliced channels_last": lambda: _last(torch.randn(4, 12, 5, 3))[:, :6],
    "expanded": lambda: torch.randn(1, 6, 5, 3).expand(4, 6, 5, 3),
    "one position": lambda: _last(torch.randn(4, 6, 1, 1)),
    "one row": lambda: _last(torch.randn(4, 6, 1, 5)),
    "one channel": lambda: _last(torch.randn(4, 1, 5, 3)),
    "one sample": lambda: torch.randn(1, 6, 5, 3).transpose(2, 3),
    "vectors": lambda: torch.randn(8, 6),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def _last(x):
    return x.to(memory_format=torch.channels_last)


def _operands(layout, act, with_residual, mask=False):
    """Arguments of `syncbn::forward`, all of whose tensors want a gradient."""
    torch.manual_seed(0)
    x = LAYOUTS[layout]().detach().requires_grad_()
    weight, bias = (torch.randn(x.shape[1]).requires_grad_() for _ in range(2))
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    kept = torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.7 if mask else None
    settings = f"{act}\ngrad\nworld\nbn"
    return x, weight, bias, residual, kept, 1e-5, settings


@each_layout
@pytest.mark.parametrize(("act", "with_residual"), [("", False), ("relu", True), ("silu", True)])
def test_fake_and_real_results_agree_for_every_layout(layout, act, with_residual):
    operands = _operands(layout, act, with_residual)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(custom_op._forward, operands, test_utils=utils)
    y, *stats, _ = custom_op._forward(*operands)
    x, weight, bias, residual, mask = (None if t is None else t.detach() for t in operands[:5])
    output = y.detach() if with_residual and act == "relu" else None
    saved = [x, weight, bias, residual if act == "silu" else None, output, mask]
    backward = (torch.randn_like(x), saved, [s.detach() for s in stats])
    for needs in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        rest = (*operands[5:], [*needs[:3], needs[3] and with_residual])
        torch.library.opcheck(custom_op._backward, (*backward, *rest), test_utils=utils[:2])


@pytest.mark.untraced
@pytest.mark.parametrize("layout", ["contiguous", "sequence", "expanded"])
@pytest.mark.parametrize("mask", [False, True])
def test_operators_pass_all_checks_of_torch_with_dynamic_shapes(layout, mask):
    torch.library.opcheck(custom_op._forward, _operands(layout, "relu", True, mask))


@pytest.mark.untraced
@pytest.mark.slow_if(lambda layout, dynamic, **_: dynamic != (layout in ("sequence", "expanded")))
@pytest.mark.world_size(2)
@pytest.mark.parametrize("layout", ["sequence", "sliced channels_last", "one row", "expanded"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layers_take_inputs_of_any_strides_on_ranks(layout, dynamic, world_size):
    _check_compiled(layout, dynamic)


@pytest.mark.untraced
@each_layout
def test_a_compiled_layer_with_a_residual_takes_inputs_of_any_strides_alone(layout):
    _check_compiled(layout, False)


def _check_compiled(layout, dynamic):
    torch._dynamo.reset()
    x = LAYOUTS[layout]().detach()
    residual = torch.randn_like(x)
    dy = torch.randn_like(x)
    results = []
    for compiled in (False, True):
        layer = syncbn.SyncBatchNorm(x.shape[1], act="relu")
        operands = [t.detach().requires_grad_() for t in (x, residual)]
        run = (
            torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            if compiled
            else layer
        )
        y = run(operands[0], residual=operands[1])
        y.backward(dy)
        results.append([y, *(t.grad for t in operands), layer.weight.grad, layer.running_var])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.untraced
@pytest.mark.world_size(2)
@pytest.mark.parametrize("track", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inductor_compiles_a_norm_between_transposes(world_size, track):
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            # tracked ones are updated by code that a C++ compiler takes many seconds for
            self.norm = nn.BatchNorm1d(6, track_running_stats=track)

        def forward(self, x):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    torch._dynamo.reset()
    torch.manual_seed(dist.get_rank())
    model = syncbn.convert_sync_batchnorm(Sequence())
    x = torch.randn(4, 7, 6)
    expected = model(x)
    y = torch.compile(model)(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
