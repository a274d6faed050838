"""The kernels on a CPU, each implementation against the same suite."""

import kernel_suite as suite
import pytest
import torch
from hypothesis import given, settings
from kernel_suite import Case

from syncbn.norm.backends import EagerKernels, Fused, Kernels, Running, whole
from syncbn.norm.backends.cpu import CpuKernels
from syncbn.norm.native import library
from syncbn.norm.ops.collectives import Call

NATIVE = library() is not None
compiled = pytest.mark.skipif(not NATIVE, reason="the native library was not built")
IMPLEMENTATIONS = [
    pytest.param(EagerKernels(), id="eager"),
    pytest.param(CpuKernels() if NATIVE else None, id="cpu", marks=compiled),
]
each = pytest.mark.parametrize("kernels", IMPLEMENTATIONS)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_moments_are_those_of_the_values(kernels: Kernels, case: Case):
    suite.check_moments(kernels, case)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_normalizing_keeps_dtype_and_layout(kernels: Kernels, case: Case):
    suite.check_normalize(kernels, case)


@each
@given(case=suite.cases())
@settings(max_examples=60)
def test_gradients_are_those_of_float64(kernels: Kernels, case: Case):
    suite.check_backward(kernels, case)


@each
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "spread"), [(100.0, 0.01), (1e4, 1.0)])
def test_a_mean_large_against_the_spread_leaves_the_variance(
    kernels: Kernels, mean: float, spread: float, channels_last: bool
):
    case = Case((16, 20, 15, 13), channels_last=channels_last)
    suite.check_far_mean(kernels, mean, spread, case)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [[5], [2**27 + 3, 7, 0], [0, 0], [1, 2, 3, 4]])
def test_moments_of_ranks_merge(kernels: Kernels, counts: list[int], dtype: torch.dtype):
    suite.check_merge(kernels, counts, 9, dtype)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("total", [0.0, 1.0, 2.0, 1e6])
def test_running_statistics_move(
    kernels: Kernels, total: float, momentum: float | None, dtype: torch.dtype
):
    suite.check_update(kernels, total, momentum, dtype)


@each
@given(case=suite.cases())
@settings(max_examples=20)
def test_results_are_the_same_bits_every_time(kernels: Kernels, case: Case):
    suite.check_deterministic(kernels, case)


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@given(case=suite.cases())
@settings(max_examples=40)
def test_a_whole_pass_at_once_gives_the_bits_of_one_step_after_another(case: Case, threads: int):
    check_at_once(case, threads)


@compiled
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (16, 37, 33, 9), (4, 300, 7, 7)])
def test_a_pass_in_several_windows_gives_the_bits_of_one(shape: tuple[int, ...], channels_last):
    for act in (None, "relu"):
        check_at_once(
            Case(shape, channels_last=channels_last, act=act, residual=act is not None), 1
        )


@compiled
def test_running_statistics_of_half_precision_move_with_a_whole_pass():
    x = torch.randn(4, 3, 20)
    mean, var = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    call = Call(eps=1e-5, running=Running(mean, var, None, 1.0))
    assert whole.forward(x, None, None, None, call, False) is not None
    expected = x.transpose(0, 1).flatten(1)
    assert torch.equal(mean, expected.mean(1).to(torch.bfloat16))
    assert torch.equal(var, expected.var(1).to(torch.bfloat16))


@compiled
def test_a_whole_pass_refuses_one_value_per_channel():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        whole.forward(torch.randn(1, 3), None, None, None, Call(eps=1e-5), False)


def check_at_once(case: Case, threads: int) -> None:
    kernels, before = CpuKernels(), torch.get_num_threads()
    given, fused = suite.backward_inputs(case)
    if given.x.numel() <= given.x.shape[1]:  # too few to normalise with
        return
    forward = Fused(case.act, given.residual, given.mask)
    call = Call(eps=1e-5, act=case.act, mask=given.mask)
    parameters = given.affine.weight, given.affine.bias
    torch.set_num_threads(threads)
    try:
        done = whole.forward(given.x, *parameters, given.residual, call, True)
        if done is None:  # left to ATen
            return
        expected = kernels.merge(kernels.moments(given.x).unsqueeze(0), 1e-5)
        affine = given.affine._replace(mean=expected.mean, invstd=expected.invstd)
        y = kernels.normalize(given.x, affine, forward)
        assert all(torch.equal(a, b) for a, b in zip(done[1].statistics, expected, strict=True))
        assert torch.equal(done[0].nan_to_num(), y.nan_to_num())
        both = whole.backward(given.dy, given.x, *parameters, fused, done[1], call)
        assert both is not None
        sums = kernels.backward_sums(given.dy, given.x, affine, fused)
        dx = kernels.backward_input(given.dy, given.x, affine, fused, sums, expected.total)
        assert torch.equal(both[0].nan_to_num(), dx.nan_to_num())
        assert torch.equal(both[1].nan_to_num(), sums.nan_to_num())
    finally:
        torch.set_num_threads(before)
