"""The Triton kernels without a GPU: their results through Triton's interpreter, their code through its compiler."""

import importlib.util

import kernel_suite as suite
import pytest
import torch
from hypothesis import example, given, settings
from kernel_suite import Case

from syncbn.norm.backends.activations import ACTIVATIONS, apply_act
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import NormArgs, Running
from syncbn.norm.backends.triton.derivative_bits import unpack_bits
from syncbn.norm.moments import Statistics

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves"),
]
interpreted = pytest.mark.triton_interpreter
some = settings(max_examples=8, deadline=None)


def backend():
    """Imported late: the interpreter must be switched on before Triton is imported."""
    from syncbn.norm.backends.triton.backend import TritonBackend

    return TritonBackend()


@pytest.mark.untraced
@interpreted
@given(case=suite.cases())
@some
def test_moments_are_those_of_the_values(case: Case):
    suite.check_local_stats(backend(), case)


@pytest.mark.untraced
@interpreted
@given(case=suite.cases())
@some
def test_normalizing_keeps_dtype_and_layout(case: Case):
    suite.check_normalize(backend(), case)


@pytest.mark.untraced
@interpreted
@given(case=suite.cases())
@some
def test_gradients_are_those_of_float64(case: Case):
    suite.check_backward(backend(), case)


@pytest.mark.untraced
@interpreted
@given(case=suite.cases())
@example(Case(residual=True, act="relu", seed=0))
@example(Case(residual=True, act="relu", seed=1))
@example(Case(masked=True))
@some
def test_finishing_a_pass_gives_the_bits_of_its_phases(case: Case):
    suite.check_finish_forward(backend(), case)


CUTS = {
    "a plane of several tiles": Case((2, 3, 1100)),
    "rows of several tiles": Case((70, 130)),
    "more images than programs": Case((20, 3, 9, 9)),
    "more rows than programs": Case((20, 70, 9, 3), channels_last=True),
    "one channel": Case((3, 1, 5, 7)),
    "one value": Case((1, 1, 1, 1)),
    "no image": Case((0, 3, 4, 4)),
    "no position": Case((3, 4, 0, 5), channels_last=True),
}


@interpreted
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS)
def test_every_value_counts_once_however_the_input_is_cut(case: Case, masked: bool):
    case = case._replace(masked=masked)
    suite.check_local_stats(backend(), case)
    suite.check_normalize(backend(), case)
    suite.check_backward(backend(), case)


@pytest.mark.untraced
@interpreted
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_those_of_the_table(act: str, residual: bool):
    case = Case((3, 5, 8, 9), act=act, residual=residual)
    suite.check_normalize(backend(), case)
    suite.check_backward(backend(), case)


@interpreted
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_at_kinks_are_those_of_the_table(act: str):
    z = torch.tensor([[-3.0, -0.0, 0.0, 3.0, 6.0, torch.nan]])
    one = torch.ones(6)
    args = NormArgs(z, act=act)
    stats = Statistics(torch.tensor(2.0, dtype=torch.float64), one * 0, one, one)
    slope = backend().grad_residual(torch.ones_like(z), args, stats)
    expected = AtenBackend().grad_residual(torch.ones_like(z), args, stats)
    torch.testing.assert_close(slope, expected, equal_nan=True)
    y = backend().normalize(args, stats)
    torch.testing.assert_close(y, apply_act(act, z), equal_nan=True)


BITS = {
    "planes": Case((3, 5, 8, 9), residual=True),
    "odd planes of several tiles": Case((2, 3, 1097), residual=True),
    "small planes": Case((4, 9, 7, 7), residual=True),
    "short rows": Case((3, 5, 13), residual=True),
    "no positions": Case((5, 24), residual=True),
    "channels_last": Case((3, 24, 5, 3), residual=True, channels_last=True),
    "many channels": Case((20, 136, 3, 3), torch.float64, residual=True, channels_last=True),
    "halves": Case((2, 16, 2, 4), torch.bfloat16, residual=True),
}


@interpreted
@pytest.mark.parametrize(
    ("kind", "act", "masked"),
    [(kind, "relu", False) for kind in BITS]
    + [
        (kind, act, True)
        for kind in ("planes", "channels_last")
        for act in ("relu", "relu6", "leaky_relu")
    ],
)
def test_bits_take_the_place_of_the_output(kind: str, act: str, masked: bool):
    case = BITS[kind]._replace(act=act, masked=masked)
    dy, args, stats = suite.forward_inputs(case)
    bits = backend().empty_bits(args)
    bits.fill_(0xAA)
    y = backend().normalize(args._replace(bits=bits), stats)
    slope = ACTIVATIONS[act].derivative(unpack_bits(bits, args.x))
    kept = torch.ones(()) if args.mask is None else args.mask
    assert torch.equal(slope * kept, ACTIVATIONS[act].derivative(y) * kept)
    found = []
    for saved in ({"output": y}, {"bits": bits}):
        given = (dy, args._replace(residual=None, **saved), stats)
        sums, dz = backend().local_grad_sums(*given, needs_dz=True)
        dx = backend().finish_backward(*given, sums.view(1, -1))
        found.append((sums, dz, dx))
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(expected, ours)


@interpreted
def test_bits_are_kept_where_values_share_bytes():
    planes, last = torch.empty(2, 6, 7, 10), torch.empty(2, 8, 5, 3)
    last = last.to(memory_format=torch.channels_last)

    def bits(x: torch.Tensor, act: str | None = "relu") -> torch.Tensor | None:
        return backend().empty_bits(NormArgs(x, act=act))

    assert bits(planes).nbytes == 2 * 6 * 16
    assert bits(last).nbytes == 2 * 5 * 3
    assert bits(planes, "silu") is None
    assert bits(planes, None) is None
    assert bits(planes[:, :, :2, :2]) is None
    assert bits(last[:, :6, :1, :1]) is None
    assert bits(planes[:0]) is None


@pytest.mark.untraced
@interpreted
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize(("mean", "spread"), [(100.0, 0.01), (1e4, 1.0)])
def test_a_mean_large_against_the_spread_leaves_the_variance(mean, spread, channels_last):
    suite.check_far_mean(
        backend(), mean, spread, Case((16, 20, 15, 13), channels_last=channels_last)
    )


@interpreted
def test_what_is_masked_may_hold_anything():
    x = torch.randn(2, 3, 4, 5)
    mask = torch.rand(2, 1, 4, 5) < 0.5
    mask[0, 0, 0, 0] = False  # a channel's first value is what its moments are counted from
    spoilt = x.masked_fill(~mask, torch.inf)
    spoilt, clean = (NormArgs(values, mask=mask) for values in (spoilt, x))
    assert torch.equal(backend().local_stats(spoilt), backend().local_stats(clean))


@interpreted
@pytest.mark.parametrize("outlier", [100.0, 1e4])
@pytest.mark.parametrize("masked", [False, True], ids=["short", "masked"])
def test_a_first_tile_unlike_the_rest_leaves_the_variance(outlier: float, masked: bool):
    """One that holds a single value, of a plane's end or of what the mask keeps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 513, generator=generator)
    mask = None
    if masked:
        mask = torch.ones(40, 1, 513, dtype=torch.bool)
        mask[0] = mask[1] = False
        mask[0, 0, 5] = True
        x[0, 0, 5] = outlier
    else:
        x[10:13, :, 512] = outlier
    packed = backend().local_stats(NormArgs(x, mask=mask))
    expected = AtenBackend().local_stats(NormArgs(x.double(), mask=mask))
    assert ((packed[3:] / expected[3:]) - 1).abs().max() < 2e-6


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "counts", [[5], [2**27 + 3, 7, 0], [0, 0], list(range(300)), list(range(1100))]
)
def test_moments_of_ranks_merge(counts, dtype):
    suite.check_merge(backend(), counts, 9, dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("total", [0.0, 1.0, 2.0, 1e6])
def test_running_statistics_move(total, momentum, dtype):
    suite.check_update(backend(), total, momentum, dtype)


@interpreted
def test_running_statistics_may_be_strided():
    strided = torch.arange(12.0).view(6, 2)
    running = Running(strided[:, 0], strided[:, 1], None, 1.0)
    gathered = backend().local_stats(NormArgs(torch.randn(8, 6)))[None]
    statistics = suite.merged(backend(), gathered, running=running)
    assert torch.equal(strided[:, 0], statistics.mean)
    suite.close(strided[:, 1], statistics.var.double() * 8 / 7, 1e-6)


@interpreted
def test_a_residual_without_activation_or_mask_gets_the_gradient_itself():
    given = suite.backward_inputs(Case())
    assert backend().grad_residual(*given) is given.dy
    assert backend().local_grad_sums(*given, needs_dz=True)[1] is given.dy


@interpreted
def test_upstream_gradients_may_have_any_strides():
    _, args, stats = suite.backward_inputs(Case((3, 4, 5, 6), channels_last=True))
    one = torch.ones(()).expand(3, 4, 5, 6)
    sums, _ = backend().local_grad_sums(one, args, stats)
    assert torch.equal(sums[0], torch.full((4,), 90.0))


@pytest.mark.untraced
@interpreted
@given(case=suite.cases())
@settings(max_examples=5, deadline=None)
def test_results_are_the_same_bits_every_time(case: Case):
    suite.check_deterministic(backend(), case)


@interpreted
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_one_value_per_channel_is_refused_before_anything_is_updated(masked: bool):
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.5)
    x, mask = torch.randn(1 + masked, 3), torch.tensor([[True], [False]]) if masked else None
    args = NormArgs(x, mask=mask, running=running)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        backend().finish_forward(args, backend().local_stats(args)[None])
    assert [t.tolist() for t in running[:3]] == [[0] * 3, [1] * 3, 0]
