"""What the native kernels promise beyond the suite: shapes that are cut in every way, and bits that stay the same."""

import subprocess
import sys
from collections.abc import Iterator

import kernel_suite as suite
import pytest
import torch
from hypothesis import given, settings
from kernel_suite import ROUNDING, TRUTH, Case, same_bits
from torch import Tensor

import syncbn
from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import NormArgs, Running
from syncbn.norm.backends.cpu import CpuBackend
from syncbn.norm.comm.exchange import Fingerprint
from syncbn.norm.moments import Moments, Statistics, pack
from syncbn.norm.native import library

if library() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

backend = CpuBackend()
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
CUTS = {
    "long rows, cut into blocks": (3, 2, 9001),
    "a last block shorter than a vector": (2, 3, 4100),
    "many samples of short rows": (150, 3, 17),
    "tiles of channels with a smaller last one": (5, 70, 49),
    "few samples, folded and left over": (1100, 1, 3),
    "fewer samples than a fold": (2, 3, 2),
    "channels too short for a vector": (7, 40, 9),
    "rows of features, in blocks": (1030, 20),
    "features in chunks": (5, 2100),
    "one value of each channel": (1, 130),
    "rows of 16": (3, 5, 4, 4),
    "volumes": (3, 33, 3, 5, 4),
}
cuts = pytest.mark.parametrize("shape", CUTS.values(), ids=CUTS)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def level() -> Iterator[None]:
    yield
    library().syncbn_limit_instruction_set(2)


def everything(case: Case) -> list[Tensor]:
    return suite.everything(backend, case)


GATHERED = pack(Moments(torch.tensor(2.0, dtype=torch.float64), *torch.ones(2, 3))).unsqueeze(0)
"""Packed moments of one rank: 2 values per channel, a mean of 1, a variance of 0.5."""


def statistics(mean: Tensor, invstd: Tensor, total: float = 2.0) -> Statistics:
    return Statistics(torch.tensor(total, dtype=torch.float64), mean, invstd**-2, invstd)


@cuts
@dtypes
def test_every_cut_counts_each_value_once(shape: tuple[int, ...], dtype: torch.dtype):
    for channels_last in (False, True)[: 1 + (len(shape) > 3)]:
        case = Case(shape, dtype, channels_last=channels_last, offset=1)
        suite.check_local_stats(backend, case)
        suite.check_normalize(backend, case)
        suite.check_backward(backend, case)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True])
@dtypes
def test_every_fusion_is_as_exact_as_its_parts(act: str | None, residual: bool, dtype: torch.dtype):
    for shape in ((5, 6, 70), (70, 24)):
        case = Case(shape, dtype, act=act, residual=residual)
        suite.check_normalize(backend, case)
        suite.check_backward(backend, case)


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_survive_a_block_that_starts_with_outliers(channels_last: bool):
    x = torch.full((64, 3, 8, 8), 1e4) + torch.randn(64, 3, 8, 8)
    x[0] = 0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    packed, truth = (b.local_stats(NormArgs(t)) for b, t in ((backend, x), (TRUTH, x.double())))
    suite.close(packed[2:5], truth[2:5], 2e-7)
    suite.close(packed[5:], truth[5:], 1e-5)


@cuts
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...], threads: None):
    case = Case((shape[0] * 40, *shape[1:]), act="relu", residual=True)
    torch.set_num_threads(1)
    alone = everything(case)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(alone, everything(case))


@given(case=suite.cases())
@settings(max_examples=40)
def test_results_do_not_depend_on_the_instruction_set(case: Case):
    case = case._replace(masked=False)
    try:
        best = library().syncbn_limit_instruction_set(2)
        newest = everything(case)
        for older in range(best):
            assert library().syncbn_limit_instruction_set(older) == older
            assert same_bits(newest, everything(case))
    finally:
        library().syncbn_limit_instruction_set(2)


@pytest.mark.parametrize("older", [0, 1, 2])
@dtypes
def test_every_instruction_set_converts_special_values(older: int, dtype: torch.dtype, level: None):
    library().syncbn_limit_instruction_set(older)
    special = [
        0.0,
        -0.0,
        1e-8,
        -3e-6,
        6e-5,
        65504.0,
        65520.0,
        1e38,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    x = torch.tensor(special * 16, dtype=torch.float64).to(dtype).view(16, 1, -1).repeat(1, 2, 2)
    ones = torch.ones(2, dtype=torch.promote_types(dtype, torch.float32))
    y = backend.normalize(NormArgs(x), statistics(ones * 0, ones))
    assert torch.equal(y.nan_to_num(7), x.nan_to_num(7))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("older", [0, 1, 2])
def test_every_instruction_set_rounds_to_even(older: int, level: None):
    library().syncbn_limit_instruction_set(older)
    exact = torch.randn(4, 16, 500, dtype=torch.float64).mul(3).exp().float()
    ones = torch.ones(16)
    for dtype in (torch.float16, torch.bfloat16):
        x = exact.to(dtype)
        y = backend.normalize(NormArgs(x, ones * 1.37), statistics(ones * 0, ones))
        assert torch.equal(y, (x.float() * 1.37).to(dtype))


@pytest.mark.parametrize("act", [None, "relu", "relu6", "leaky_relu", "silu", "hardswish"])
def test_nan_passes_activations_as_in_torch(act: str | None):
    x = torch.randn(2, 3, 20)
    x[0, 1, 3] = torch.nan
    ones = torch.ones(3)
    y = backend.normalize(NormArgs(x, act=act), statistics(ones * 0, ones))
    assert torch.equal(y.isnan(), x.isnan())


def strided(kind: str) -> Tensor:
    if kind == "sliced":
        return torch.randn(4, 8, 6, 7)[:, 1:6, :, ::2]
    if kind == "channels last, sliced":
        return torch.randn(4, 5, 6, 7).contiguous(memory_format=torch.channels_last)[::2, :, 1:]
    if kind == "permuted":
        return torch.randn(6, 5, 4, 7).permute(2, 1, 0, 3)
    return torch.randn(1, 5, 1, 1).expand(4, 5, 6, 7)


@pytest.mark.parametrize("act", [None, "relu"])
def test_alone_nan_goes_through_the_phases_as_in_aten(act: str | None):
    x = torch.randn(4, 3, 5)
    x[1, 2, 3] = torch.nan
    found = []
    for backend in (CpuBackend(), AtenBackend()):
        running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
        args = NormArgs(x, act=act, running=running)
        y, _ = backend.finish_forward(args, backend.local_stats(args).unsqueeze(0))
        found.append((y, *running[:3]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["sliced", "channels last, sliced", "permuted", "expanded"])
def test_any_strides_are_taken(kind: str):
    x = strided(kind)
    dy, sums = torch.randn(1, 5, 1, 1).expand_as(x), torch.randn(1, 10)
    _, args, stats = suite.forward_inputs(Case((2, 5, 3), act="relu"))
    given = suite.Inputs(dy, args._replace(x=x, residual=x), stats)
    wide = given.double()
    suite.close(backend.local_stats(given.args), TRUTH.local_stats(wide.args), 2e-6)
    y = backend.normalize(given.args, stats)
    suite.close(y, TRUTH.normalize(*wide[1:]), 2e-6)
    dx = backend.finish_backward(dy, given.args.before_act(), stats, sums)
    truth = TRUTH.finish_backward(wide.dy, wide.args.before_act(), wide.stats, sums.double())
    suite.close(dx, truth, 8e-6)
    channels_last = x.stride(1) == 1
    assert y.is_contiguous() == (not channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_residual_of_another_dtype_is_taken():
    _, args, stats = suite.forward_inputs(Case((3, 5, 20), torch.bfloat16, act="relu"))
    args = args._replace(residual=torch.randn(3, 5, 20))
    y = suite.serving(backend, args).normalize(args, stats)
    assert torch.equal(y, AtenBackend().normalize(args, stats))


def test_running_statistics_made_in_inference_mode_are_moved():
    with torch.inference_mode():
        running = Running(torch.zeros(3), torch.ones(3), None, 0.5)
        suite.merged(backend, GATHERED, running=running)
        assert running.mean.tolist() == [0.5] * 3


def test_gradients_of_a_batch_that_was_overwritten_are_refused():
    running = Running(torch.zeros(3), torch.ones(3), None, 0.5)
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.nn.functional.batch_norm(x, running.mean, running.var)
    suite.merged(backend, GATHERED, running=running)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_default_device_is_not_that_of_what_the_kernels_need():
    dy, args, _ = suite.backward_inputs(Case((4, 5, 6, 7)))
    what, fused = Fingerprint("", 5, torch.float32, True), suite.serving(backend, args)
    assert isinstance(fused, CpuBackend)
    y, _ = fused.fused_forward(args, None, what)
    with torch.device("meta"):
        unfused = backend.local_stats(args).unsqueeze(0)
        _, found = backend.finish_forward(args, unfused)
        sums, _ = backend.local_grad_sums(dy, args, found)
        again, stats = fused.fused_forward(args, None, what)
        gradients = fused.fused_backward(dy, args, stats, None, what)
    assert torch.equal(again, y)
    assert all(
        values.is_cpu
        for values in (sums, found.mean, found.total, stats.mean, stats.total, *gradients)
    )


def test_a_pass_that_the_kernels_do_not_serve_is_finished_by_them_once_act_is_undone():
    _, args, stats = suite.backward_inputs(Case((3, 5, 20), torch.bfloat16, act="silu"))
    dy, args = torch.randn_like(args.x), args._replace(residual=torch.randn(3, 5, 20))
    fallback = suite.serving(backend, args)
    assert not isinstance(fallback, CpuBackend)
    sums, dz = fallback.local_grad_sums(dy, args, stats, needs_dz=True)
    assert torch.equal(dz, AtenBackend().grad_residual(dy, args, stats))
    rest = args.before_act()
    assert torch.equal(sums, backend.local_grad_sums(dz, rest, stats)[0])
    dx = fallback.finish_backward(dz, rest, stats, sums.view(1, -1))
    assert torch.equal(dx, backend.finish_backward(dz, rest, stats, sums.view(1, -1)))


@pytest.mark.slow_if(lambda mode, **_: mode != "FakeTensorMode()")
@pytest.mark.parametrize(
    "mode", ["FakeTensorMode()", "torch.inference_mode()", "torch.device('meta')"]
)
def test_a_first_import_within_a_mode_leaves_nothing_behind(mode):
    code = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        f"with {mode}:\n    import syncbn.norm.backends.cpu, syncbn\n"
        "x = torch.randn(8, 64, 56, 56, requires_grad=True)\n"
        "syncbn.SyncBatchNorm(64, act='relu')(x).sum().backward()\n"
        "assert x.grad.isfinite().all()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_backward_pass_reads_statistics_where_their_memory_lies_now():
    x, dy = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 8, 8)
    y = syncbn.sync_batch_norm(x, act="relu")
    before = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    y.grad_fn.stats.mean.share_memory_()
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], before)
