"""What the native kernels promise beyond the suite: shapes that are cut in every way, and bits that stay the same."""

from collections.abc import Iterator

import kernel_suite as suite
import pytest
import torch
from hypothesis import given, settings
from kernel_suite import ROUNDING, TRUTH, Case
from torch import Tensor

from syncbn.norm.backends import ACTIVATIONS, Affine, EagerKernels, Fused, Running, whole
from syncbn.norm.backends.cpu import CpuKernels
from syncbn.norm.moments import Statistics
from syncbn.norm.native import library
from syncbn.norm.ops.collectives import Call

if library() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

kernels = CpuKernels()
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
    library().syncbn_limit_level(2)


def everything(case: Case) -> list[Tensor]:
    return suite.everything(kernels, case)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@cuts
@dtypes
def test_every_cut_counts_each_value_once(shape: tuple[int, ...], dtype: torch.dtype):
    for channels_last in (False, True)[: 1 + (len(shape) > 3)]:
        case = Case(shape, dtype, channels_last=channels_last, offset=1)
        suite.check_moments(kernels, case)
        suite.check_normalize(kernels, case)
        suite.check_backward(kernels, case)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True])
@dtypes
def test_every_fusion_is_as_exact_as_its_parts(act: str | None, residual: bool, dtype: torch.dtype):
    for shape in ((5, 6, 70), (70, 24)):
        case = Case(shape, dtype, act=act, residual=residual)
        suite.check_normalize(kernels, case)
        suite.check_backward(kernels, case)


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_survive_a_block_that_starts_with_outliers(channels_last: bool):
    x = torch.full((64, 3, 8, 8), 1e4) + torch.randn(64, 3, 8, 8)
    x[0] = 0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    packed, truth = kernels.moments(x), TRUTH.moments(x.double())
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
        best = library().syncbn_limit_level(2)
        newest = everything(case)
        for older in range(best):
            assert library().syncbn_limit_level(older) == older
            for a, b in zip(newest, everything(case), strict=True):
                assert torch.equal(a, b)
    finally:
        library().syncbn_limit_level(2)


@pytest.mark.parametrize("older", [0, 1, 2])
@dtypes
def test_every_instruction_set_converts_special_values(older: int, dtype: torch.dtype, level: None):
    library().syncbn_limit_level(older)
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
    y = kernels.normalize(x, Affine(ones * 0, ones), Fused())
    assert torch.equal(y.nan_to_num(7), x.nan_to_num(7))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("older", [0, 1, 2])
def test_every_instruction_set_rounds_to_even(older: int, level: None):
    library().syncbn_limit_level(older)
    exact = torch.randn(4, 16, 500, dtype=torch.float64).mul(3).exp().float()
    ones = torch.ones(16)
    for dtype in (torch.float16, torch.bfloat16):
        x = exact.to(dtype)
        y = kernels.normalize(x, Affine(ones * 0, ones, ones * 1.37), Fused())
        assert torch.equal(y, (x.float() * 1.37).to(dtype))


@pytest.mark.parametrize("act", [None, "relu", "relu6", "leaky_relu", "silu", "hardswish"])
def test_nan_passes_activations_as_in_torch(act: str | None):
    x = torch.randn(2, 3, 20)
    x[0, 1, 3] = torch.nan
    ones = torch.ones(3)
    y = kernels.normalize(x, Affine(ones * 0, ones), Fused(act))
    assert torch.equal(y.isnan(), x.isnan())


def strided(kind: str) -> Tensor:
    if kind == "sliced":
        return torch.randn(4, 8, 6, 7)[:, 1:6, :, ::2]
    if kind == "channels last, sliced":
        return torch.randn(4, 5, 6, 7).contiguous(memory_format=torch.channels_last)[::2, :, 1:]
    if kind == "permuted":
        return torch.randn(6, 5, 4, 7).permute(2, 1, 0, 3)
    return torch.randn(1, 5, 1, 1).expand(4, 5, 6, 7)


@pytest.mark.parametrize("kind", ["sliced", "channels last, sliced", "permuted", "expanded"])
def test_any_strides_are_taken(kind: str):
    x = strided(kind)
    dy, affine = torch.randn(1, 5, 1, 1).expand_as(x), suite.inputs(Case((2, 5, 3))).affine
    wide = Affine(*(None if values is None else values.double() for values in affine))
    sums, total = torch.randn(2, 5), torch.full((), 9.0, dtype=torch.float64)
    suite.close(kernels.moments(x), TRUTH.moments(x.double()), 2e-6)
    y = kernels.normalize(x, affine, Fused("relu", residual=x))
    suite.close(y, TRUTH.normalize(x.double(), wide, Fused("relu", x.double())), 2e-6)
    dx = kernels.backward_input(dy, x, affine, Fused(), sums, total)
    truth = TRUTH.backward_input(dy.double(), x.double(), wide, Fused(), sums.double(), total)
    suite.close(dx, truth, 8e-6)
    channels_last = x.stride(1) == 1
    assert y.is_contiguous() == (not channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_residual_of_another_dtype_is_taken():
    case = Case((3, 5, 20), torch.bfloat16)
    given = suite.inputs(case)
    fused = Fused("relu", torch.randn(3, 5, 20))
    y = kernels.normalize(given.x, given.affine, fused)
    assert torch.equal(y, EagerKernels().normalize(given.x, given.affine, fused))


def test_running_statistics_made_in_inference_mode_are_moved():
    with torch.inference_mode():
        running = Running(torch.zeros(3), torch.ones(3), None, 0.5)
        ones = torch.ones(3)
        kernels.update(
            running, Statistics(torch.tensor(2.0, dtype=torch.float64), ones, ones, ones)
        )
        assert running.mean.tolist() == [0.5] * 3


def test_gradients_of_a_batch_that_was_overwritten_are_refused():
    running = Running(torch.zeros(3), torch.ones(3), None, 0.5)
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.nn.functional.batch_norm(x, running.mean, running.var)
    ones = torch.ones(3)
    kernels.update(running, Statistics(torch.tensor(4.0, dtype=torch.float64), ones, ones, ones))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_default_device_is_not_that_of_what_the_kernels_need():
    given, fused = suite.backward_inputs(Case((4, 5, 6, 7)))
    call = Call(eps=1e-5)
    parameters = given.affine.weight, given.affine.bias
    done = whole.forward(given.x, *parameters, None, call, True)
    with torch.device("meta"):
        sums = kernels.backward_sums(given.dy, given.x, given.affine, fused)
        merged = kernels.merge(kernels.moments(given.x).unsqueeze(0), 1e-5)
        again = whole.forward(given.x, *parameters, None, call, True)
        gradients = whole.backward(given.dy, given.x, *parameters, fused, again[1], call)
    assert torch.equal(again[0], done[0])
    assert all(values.is_cpu for values in (sums, *merged, again[1].values, *gradients))
