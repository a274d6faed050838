"""Columns that maps take row by row, as those of inputs beyond the caches: rows of 256 to 4095 bytes, from 2 MiB on."""

from collections.abc import Iterator

import kernel_suite as suite
import pytest
import torch
from kernel_suite import ROUNDING, Case
from test_kernels import check_fused

from syncbn.norm.backends.base import NormArgs
from syncbn.norm.backends.cpu import CpuBackend
from syncbn.norm.native import library

pytestmark = pytest.mark.untraced
if library() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

backend = CpuBackend()
STREAMED_BYTES = 2**21
SHORTEST, LONGEST = 256, 4095
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def rows_of(row_bytes: int, dtype: torch.dtype, **more) -> Case:
    """An odd number of rows, just enough to be streamed; each ends within a vector where it can."""
    channels = row_bytes // dtype.itemsize
    rows = (STREAMED_BYTES // (channels * dtype.itemsize) + 2) | 1
    return Case((rows, channels), dtype, offset=1, **more)


@pytest.fixture
def settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    library().syncbn_limit_instruction_set(2)


def check_local_stats(case: Case) -> None:
    """As the suite's, but that the worst of thousands of channels, over a short input, is a few units off."""
    x = suite.forward_inputs(case).args.x
    packed = backend.local_stats(NormArgs(x))
    truth = suite.TRUTH.local_stats(NormArgs(x.double()))
    assert torch.equal(packed[:2].double(), truth[:2])
    bound = 1e-11 if case.dtype == torch.float64 else 1e-5
    for actual, expected in zip(packed[2:].chunk(2), truth[2:].chunk(2), strict=True):
        suite.close(actual, expected, bound, expected.abs().max().clamp(min=1))


@pytest.mark.slow_if(
    lambda level, row_bytes, dtype, **_: (
        level < 2 and row_bytes != LONGEST and dtype != torch.float32
    )
)
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("row_bytes", [SHORTEST, 616, LONGEST])
@dtypes
def test_every_pass_is_that_of_float64(
    dtype: torch.dtype, row_bytes: int, level: int, settings: None
):
    if library().syncbn_limit_instruction_set(level) != level:
        pytest.skip("this processor has no such instructions")
    case = rows_of(row_bytes, dtype, act="relu", residual=row_bytes == 616)
    check_local_stats(case)
    suite.check_normalize(backend, case)
    suite.check_backward(backend, case)


@dtypes
def test_samples_folded_to_a_row_and_those_left_over_count_once(dtype: torch.dtype):
    samples = STREAMED_BYTES // (21 * dtype.itemsize) + 100
    assert samples % 7
    case = Case((samples + 1 - samples % 7, 3, 7), dtype, act="relu")
    suite.check_local_stats(backend, case)
    suite.check_normalize(backend, case)
    suite.check_backward(backend, case)


@pytest.mark.slow_if(lambda dtype, **_: dtype == torch.float16)
@dtypes
def test_bits_depend_on_neither_threads_nor_instruction_set(dtype: torch.dtype, settings: None):
    case = rows_of(616, dtype, act="relu", residual=True)
    torch.set_num_threads(1)
    expected = suite.everything(backend, case)
    for level in range(library().syncbn_limit_instruction_set(2) + 1):
        library().syncbn_limit_instruction_set(level)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert suite.same_bits(suite.everything(backend, case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_in_one_call_gives_the_bits_of_its_phases(dtype: torch.dtype):
    for threads in (1, 2):
        check_fused(rows_of(616, dtype, act="relu", residual=True), threads)


@pytest.mark.parametrize("size", [8, 17, 127, 128, 257, 8191, 8193])
@dtypes
def test_planes_in_tiles_of_every_size_count_each_value_once(dtype: torch.dtype, size: int):
    case = Case((3, 71 if size < 1000 else 3, size), dtype, act="relu", offset=1)
    suite.check_local_stats(backend, case)
    suite.check_normalize(backend, case)
    suite.check_backward(backend, case)
