"""The backends of a CPU, each against the same suite, and passes in one call against their phases."""

import kernel_suite as suite
import pytest
import torch
from hypothesis import given, settings
from kernel_suite import Case

from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import Backend, NormArgs, Running
from syncbn.norm.backends.cpu import CpuBackend
from syncbn.norm.comm.exchange import Fingerprint
from syncbn.norm.native import library

NATIVE = library() is not None
compiled = pytest.mark.skipif(not NATIVE, reason="the native library was not built")
BACKENDS = [
    pytest.param(AtenBackend(), id="aten"),
    pytest.param(CpuBackend() if NATIVE else None, id="cpu", marks=compiled),
]
each = pytest.mark.parametrize("backend", BACKENDS)
ALONE = Fingerprint("", 3, torch.float32, True)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_moments_are_those_of_the_values(backend: Backend, case: Case):
    suite.check_local_stats(backend, case)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_normalizing_keeps_dtype_and_layout(backend: Backend, case: Case):
    suite.check_normalize(backend, case)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_gradients_are_those_of_float64(backend: Backend, case: Case):
    suite.check_backward(backend, case)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_finishing_a_pass_gives_the_bits_of_its_phases(backend: Backend, case: Case):
    suite.check_finish_forward(backend, case)


@each
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "spread"), [(100.0, 0.01), (1e4, 1.0)])
def test_a_mean_large_against_the_spread_leaves_the_variance(
    backend: Backend, mean: float, spread: float, channels_last: bool
):
    case = Case((16, 20, 15, 13), channels_last=channels_last)
    suite.check_far_mean(backend, mean, spread, case)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [[5], [2**27 + 3, 7, 0], [0, 0], [1, 2, 3, 4]])
def test_moments_of_ranks_merge(backend: Backend, counts: list[int], dtype: torch.dtype):
    suite.check_merge(backend, counts, 9, dtype)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("total", [0.0, 1.0, 2.0, 1e6])
def test_running_statistics_move(
    backend: Backend, total: float, momentum: float | None, dtype: torch.dtype
):
    suite.check_update(backend, total, momentum, dtype)


@each
@given(case=suite.cases())
@settings(max_examples=20)
def test_results_are_the_same_bits_every_time(backend: Backend, case: Case):
    suite.check_deterministic(backend, case)


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@given(case=suite.cases())
@settings(max_examples=40)
def test_a_pass_in_one_call_gives_the_bits_of_its_phases(case: Case, threads: int):
    check_fused(case, threads)


@compiled
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (16, 37, 33, 9), (4, 300, 7, 7)])
def test_a_pass_in_several_windows_gives_the_bits_of_one(shape: tuple[int, ...], channels_last):
    for act in (None, "relu"):
        check_fused(Case(shape, channels_last=channels_last, act=act, residual=act is not None), 1)


@compiled
def test_running_statistics_of_half_precision_move_with_a_pass_in_one_call():
    x = torch.randn(4, 3, 20)
    mean, var = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    args = NormArgs(x, running=Running(mean, var, None, 1.0))
    fused(args).fused_forward(args, None, ALONE)
    expected = x.transpose(0, 1).flatten(1)
    assert torch.equal(mean, expected.mean(1).to(torch.bfloat16))
    assert torch.equal(var, expected.var(1).to(torch.bfloat16))


@compiled
def test_a_pass_in_one_call_refuses_one_value_per_channel():
    args = NormArgs(torch.randn(1, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(args).fused_forward(args, None, ALONE)


def fused(args: NormArgs) -> CpuBackend:
    """The backend of a pass of this rank alone, which takes one call."""
    found = suite.serving(CpuBackend(), args)
    assert isinstance(found, CpuBackend)
    assert found.fused
    return found


def check_fused(case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    forward, (dy, args, _) = suite.forward_inputs(case).args, suite.backward_inputs(case)
    if args.x.numel() <= args.x.shape[1]:  # too few to normalise with
        return
    if not suite.serving(CpuBackend(), forward).fused:  # left to ATen
        return
    backend = fused(forward)
    torch.set_num_threads(threads)
    try:
        y, stats = backend.fused_forward(forward, None, ALONE)
        expected = suite.merged(backend, backend.local_stats(forward).unsqueeze(0), forward.eps)
        names = ("total", "mean", "var", "invstd")
        assert all(torch.equal(getattr(stats, n), getattr(expected, n)) for n in names)
        assert suite.same_bits([y], [backend.normalize(forward, expected)])
        dx, sums = backend.fused_backward(dy, args, stats, None, ALONE)
        expected_sums, _ = backend.local_grad_sums(dy, args, expected)
        expected_dx = backend.finish_backward(dy, args, expected, expected_sums.view(1, -1))
        assert suite.same_bits([dx, sums], [expected_dx, expected_sums])
    finally:
        torch.set_num_threads(before)
