"""The kernels on a CPU, each implementation against the same suite."""

import kernel_suite as suite
import pytest
import torch
from hypothesis import given, settings
from kernel_suite import Case

from syncbn.norm.kernels import EagerKernels, Kernels
from syncbn.norm.kernels.cpu import CpuKernels
from syncbn.norm.native import library

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
