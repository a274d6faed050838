"""The layer on a GPU: right, never waiting for the device, and captured in graphs."""

from collections.abc import Callable

import kernel_suite as suite
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from kernel_suite import Case
from oracle import assert_close, own_part
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchsFunction

import syncbn
from syncbn.norm.backends import selected
from syncbn.norm.backends.activations import apply_act
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import Backend, NormArgs
from syncbn.norm.moments import Statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LAYOUTS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def backend() -> Backend:
    found = selected("cuda")
    assert isinstance(found, Backend)
    assert not isinstance(found, AtenBackend), "triton is missing"
    return found


def moments(x: Tensor) -> Tensor:
    return backend().local_stats(NormArgs(x))


@given(case=suite.cases())
@settings(max_examples=60, deadline=None)
def test_kernels_are_those_of_float64(case: Case):
    suite.check_local_stats(backend(), case, "cuda")
    suite.check_normalize(backend(), case, "cuda")
    suite.check_backward(backend(), case, "cuda")
    suite.check_deterministic(backend(), case, "cuda")
    suite.check_finish_forward(backend(), case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True], ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (33, 512, 14, 14), (32, 2048, 7, 7)])
def test_layers_of_a_network_are_those_of_float64(shape, channels_last: bool, dtype: torch.dtype):
    case = Case(shape, dtype, channels_last=channels_last, act="relu", residual=True)
    suite.check_local_stats(backend(), case, "cuda")
    suite.check_normalize(backend(), case, "cuda")
    suite.check_backward(backend(), case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "counts", [[5], [2**27 + 3, 7, 0], [0, 0], list(range(300)), list(range(1100))]
)
def test_moments_of_ranks_merge(counts: list[int], dtype: torch.dtype):
    suite.check_merge(backend(), counts, 9, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move(momentum: float | None, dtype: torch.dtype):
    for total in (0.0, 1.0, 1e6):
        suite.check_update(backend(), total, momentum, dtype, "cuda")


@each_layout
def test_a_mean_large_against_the_spread_leaves_the_variance(layout: torch.memory_format):
    x = (torch.randn(16, 20, 15, 13) * 0.01 + 100).cuda().to(memory_format=layout)
    mean, M2 = moments(x)[2:].cpu().chunk(2)
    truth = x.double().cpu().transpose(0, 1).flatten(1)
    suite.close(mean, truth.mean(1), 2e-7)
    suite.close(M2 / truth.shape[1], truth.var(1, unbiased=False), 1e-4)


def test_eps_reaches_float64_statistics_whole():
    same = torch.full((4, 2), 3.0, dtype=torch.float64, device="cuda")
    statistics = suite.merged(backend(), moments(same)[None])
    assert statistics.invstd.tolist() == pytest.approx([1e-5**-0.5] * 2, rel=1e-13)


@each_layout
def test_offsets_may_exceed_32_bits(layout: torch.memory_format):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(5, 4, 2**13, 2**14, dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=layout)
    x[4, 3] = 1
    packed = moments(x)
    mean, M2 = packed[2:].view(2, 4)
    assert mean.tolist() == pytest.approx([0, 0, 0, 0.2])
    assert M2.tolist() == pytest.approx([0, 0, 0, 5 * 2**27 * 0.16])
    statistics = suite.merged(backend(), packed[None], 0.0)
    one = torch.ones_like(mean)
    stats = Statistics(statistics.total, statistics.mean, one, one)
    y = backend().normalize(NormArgs(x), stats)
    assert y[4, 3, -1, -1].item() == pytest.approx(0.8, rel=1e-2)
    assert y[3, 3, -1, -1].item() == pytest.approx(-0.2, rel=1e-2)


@pytest.fixture
def nccl(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def synchronised(group, **fused: object) -> Callable[[Tensor], Tensor]:
    """The path of several ranks in a group of one, over 8 channels, with parameters and buffers of its own."""
    parameters = [torch.rand(8, device="cuda", requires_grad=True) for _ in range(2)]
    buffers = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    count = torch.zeros((), dtype=torch.int64, device="cuda")

    def layer(x: Tensor) -> Tensor:
        return syncbn.sync_batch_norm(
            x, *buffers, *parameters, num_batches_tracked=count, process_group=group, **fused
        )

    return layer


@each_layout
def test_the_synchronised_path_matches_float64_on_the_cpu(nccl, layout: torch.memory_format):
    whole, dy = torch.randn(8, 6, 5, 5), torch.randn(8, 6, 5, 5)
    x = whole.cuda().to(memory_format=layout).requires_grad_()
    running_mean, running_var = torch.zeros(6).cuda(), torch.ones(6).cuda()
    y = syncbn.sync_batch_norm(x, running_mean, running_var, process_group=nccl)
    (dx,) = torch.autograd.grad(y, x, dy.cuda())
    oracle = nn.BatchNorm2d(6, affine=False).double()
    reference = whole.double().requires_grad_()
    expected = oracle(reference)
    (expected_dx,) = torch.autograd.grad(expected, reference, dy.double())
    assert_close(y.cpu(), expected.float(), 1e-4, "output")
    assert_close(dx.cpu(), expected_dx.float(), 1e-4, "input gradient")
    assert_close(running_var.cpu(), oracle.running_var.float(), 1e-4, "running_var")
    assert y.is_contiguous(memory_format=layout)


@each_layout
def test_the_synchronised_path_matches_torchs(nccl, layout: torch.memory_format):
    x = torch.randn(8, 6, 5, 5, device="cuda").to(memory_format=layout).requires_grad_()
    dy = torch.randn_like(x)
    weight, bias = (torch.rand(6, device="cuda", requires_grad=True) for _ in range(2))
    results = []
    for ours in (True, False):
        buffers = torch.zeros(6, device="cuda"), torch.ones(6, device="cuda")
        if ours:
            y = syncbn.sync_batch_norm(x, *buffers, weight, bias, process_group=nccl)
        else:
            y = TorchsFunction.apply(x, weight, bias, *buffers, 1e-5, 0.1, nccl, 1)
        results.append([y, *torch.autograd.grad(y, [x, weight, bias], dy), *buffers])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, 1e-5)


FUSED = {
    "plain": {},
    "fused": {"act": "relu", "residual": True},
    "masked": {"act": "silu", "mask": True},
}
each_way = pytest.mark.parametrize("ways", FUSED.values(), ids=FUSED)


def operands(ways: dict[str, object], x: Tensor) -> dict[str, object]:
    made = {"residual": torch.randn_like(x), "mask": torch.rand_like(x[:, :1]) < 0.6}
    return {name: made.get(name, value) for name, value in ways.items()}


@each_way
def test_nothing_waits_for_the_device(nccl, ways: dict[str, object]):
    x = torch.randn(8, 8, 4, 4, device="cuda", requires_grad=True)
    layer = synchronised(nccl, **operands(ways, x.detach()))
    layer(x).square().sum().backward()  # the first call compiles, and sets NCCL up
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_way
def test_forward_and_backward_are_captured_in_a_graph(nccl, ways: dict[str, object]):
    x = torch.randn(8, 8, 4, 4, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    layer = synchronised(nccl, **operands(ways, x.detach()))

    def step() -> tuple[Tensor, Tensor]:
        y = layer(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step()
    with torch.no_grad():
        x.mul_(3).add_(1)
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@each_layout
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", "silu"])
def test_fused_gradients_are_those_of_float64(nccl, act: str, layout: torch.memory_format):
    """Of a residual too, whose gradient the reduction writes, from bits where a derivative has but two values."""
    whole, residual, dy = (torch.randn(4, 16, 24, 8) for _ in range(3))
    oracle = nn.BatchNorm2d(16, affine=False).double()
    operands = [t.double().requires_grad_() for t in (whole, residual)]
    expected = apply_act(act, oracle(operands[0]) + operands[1])
    expected_gradients = torch.autograd.grad(expected, operands, dy.double())
    x, r = (t.cuda().to(memory_format=layout).requires_grad_() for t in (whole, residual))
    y = syncbn.sync_batch_norm(x, residual=r, act=act, process_group=nccl)
    gradients = torch.autograd.grad(y, [x, r], dy.cuda())
    assert_close(y.cpu(), expected, 1e-5, "output")
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_close(ours.cpu(), theirs, 1e-5, "gradient")


def test_programs_that_share_channels_give_the_same_bits_every_time():
    x = torch.randn(32, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last)
    expected = moments(x)
    for _ in range(200):
        assert torch.equal(moments(x), expected)


def test_a_compiled_layer_has_no_graph_break(nccl):
    x = torch.randn(8, 6, 5, 5, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    layer = syncbn.SyncBatchNorm(6, act="relu", device="cuda")
    residual = torch.randn_like(x)
    expected = layer(x, residual=residual)
    compiled = torch.compile(layer, fullgraph=True)(x, residual=residual)
    assert_close(compiled, expected, 1e-6, "output")
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (compiled, expected)]
    assert_close(*gradients, 1e-6, "input gradient")


@pytest.mark.world_size(2)
@each_layout
def test_two_ranks_give_the_numbers_of_one(layout: torch.memory_format, world_size: int):
    """Over gloo, because NCCL refuses two ranks on one GPU."""
    generator = torch.Generator().manual_seed(0)
    whole, dy = (torch.randn(7, 6, 5, 4, generator=generator) for _ in range(2))
    oracle = nn.BatchNorm2d(6).double()
    reference = whole.double().requires_grad_()
    expected = oracle(reference)
    (expected_dx,) = torch.autograd.grad(expected, reference, dy.double())
    x = own_part(whole, [5, 2]).cuda().to(memory_format=layout).requires_grad_()
    layer = syncbn.SyncBatchNorm(6, device="cuda")
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, own_part(dy, [5, 2]).cuda())
    assert_close(y.cpu(), own_part(expected, [5, 2]), 1e-5, "output")
    assert_close(dx.cpu(), own_part(expected_dx, [5, 2]), 1e-5, "input gradient")
    assert_close(layer.running_var.cpu(), oracle.running_var, 1e-5, "running_var")
