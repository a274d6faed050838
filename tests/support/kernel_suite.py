"""What every implementation of the layer's kernels must do: one suite of checks, EagerKernels in float64 the truth.

A test file parametrises the checks over its kernels and hands them `Case`s; which case is a hypothesis strategy
here, so that all implementations face the same inputs. Truth is computed from the very values the kernels got.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from syncbn.norm.kernels import ACTIVATIONS, Affine, EagerKernels, Fused, Kernels, Running
from syncbn.norm.moments import Moments, Statistics, pack, unpack

TRUTH = EagerKernels()
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""Bounds on the error of an element, relative to the largest magnitude: two units in the last place, or more."""
KINKS = (-3.0, 0.0, 3.0, 6.0)
"""Where some activation's derivative jumps: no gradient is compared within rounding of one."""

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format, by dimensions, that is not the contiguous one."""


class Case(NamedTuple):
    """An input and all that goes with it, drawn from `seed`."""

    shape: tuple[int, ...] = (4, 5, 6, 7)
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = torch.float32
    channels_last: bool = False
    act: str | None = None
    residual: bool = False
    masked: bool = False
    seed: int = 0
    offset: int = 0
    """Elements by which the storage starts off a round address."""


class Inputs(NamedTuple):
    """The tensors of a case."""

    x: Tensor
    dy: Tensor
    affine: Affine
    residual: Tensor | None
    mask: Tensor | None


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Of 2 to 5 dimensions, empty batches, single channels and sizes divisible by nothing among them."""
    batch, channels = st.integers(0, 9), st.integers(1, 40)
    sizes = {2: 1, 3: 70, 4: 9, 5: 5}
    return st.integers(2, 5).flatmap(
        lambda dims: st.tuples(batch, channels, *[st.integers(1, sizes[dims])] * (dims - 2))
    )


def cases(dtypes: tuple[torch.dtype, ...] = tuple(ROUNDING)) -> st.SearchStrategy[Case]:
    """Every combination of what kernels are promised to take."""
    return st.builds(
        Case,
        shape=shapes(),
        dtype=st.sampled_from(dtypes),
        parameters=st.sampled_from((None, torch.float32, torch.float64, torch.bfloat16)),
        channels_last=st.booleans(),
        act=st.sampled_from((None, *ACTIVATIONS)),
        residual=st.booleans(),
        masked=st.booleans(),
        seed=st.integers(0, 2**16),
        offset=st.integers(0, 3),
    )


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of `case`, on `device`."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def laid_out() -> Tensor:
        return _laid_out(random(*case.shape).to(case.dtype), case).to(device)

    channels = case.shape[1]
    stats = torch.promote_types(case.dtype, torch.float32)
    weight = bias = None
    if case.parameters is not None:
        weight, bias = (random(channels).to(device, case.parameters) for _ in range(2))
    mean, invstd = random(channels), random(channels).exp()
    mask = None
    if case.masked:
        mask = torch.rand(case.shape[0], 1, *case.shape[2:], generator=generator) < 0.6
    return Inputs(
        laid_out(),
        laid_out(),
        Affine(mean.to(device, stats), invstd.to(device, stats), weight, bias),
        laid_out() if case.residual else None,
        None if mask is None else mask.to(device),
    )


def check_moments(kernels: Kernels, case: Case, device: str = "cpu") -> None:
    """Count, mean and M2 are those of the values where the mask is true."""
    given = inputs(case, device)
    packed = kernels.moments(given.x, given.mask)
    expected = TRUTH.moments(given.x.double(), given.mask)
    assert packed.dtype == given.affine.mean.dtype
    assert packed.shape == expected.shape
    assert torch.equal(packed[:2].double(), expected[:2])
    bound = 1e-11 if case.dtype == torch.float64 else 2e-6
    _, mean, M2 = unpack(packed[None])
    _, true_mean, true_M2 = unpack(expected[None])
    close(mean, true_mean, bound, given.x.double().abs().amax() if given.x.numel() else None)
    close(M2, true_M2, bound)


def check_normalize(kernels: Kernels, case: Case, device: str = "cpu") -> None:
    """act((x - mean) * invstd * weight + bias + residual), in the dtype and layout of x."""
    given, fused = forward_inputs(case, device)
    y = kernels.normalize(given.x, given.affine, fused)
    truth = TRUTH.normalize(given.x.double(), *_double(given, case, None))
    _assert_like(y, given.x)
    terms = [t for t in (truth, given.affine.bias, given.residual) if t is not None and t.numel()]
    largest = torch.stack([t.double().abs().max() for t in terms]).max() if y.numel() else None
    close(y, truth, ROUNDING[case.dtype], largest)


def check_backward(kernels: Kernels, case: Case, device: str = "cpu") -> None:
    """Both sums, the gradient of the input and that of the residual."""
    given, fused = backward_inputs(case, device)
    affine, truth = _double(given, case, fused)
    wide = (given.dy.double(), given.x.double(), affine, truth)
    exact = given.affine.mean.dtype == torch.float64
    sums = kernels.backward_sums(given.dy, given.x, given.affine, fused)
    assert sums.dtype == given.affine.mean.dtype
    assert sums.shape == (2, case.shape[1])
    close(sums, TRUTH.backward_sums(*wide), 1e-11 if exact else 4e-6, _sum_scale(*wide[:3]))
    total = torch.full((), max(given.x.numel() // case.shape[1], 1), dtype=torch.float64)
    total = total.to(device)
    dx = kernels.backward_input(given.dy, given.x, given.affine, fused, sums, total)
    _assert_like(dx, given.x)
    expected = TRUTH.backward_input(*wide, sums.double(), total)
    largest = None
    if dx.numel():
        largest = _largest_term(wide[0], wide[1], affine, sums.double() / total)
    close(dx, expected, ROUNDING[case.dtype], largest)
    if case.act is not None:
        dresidual = kernels.backward_residual(given.dy, given.x, given.affine, fused)
        _assert_like(dresidual, given.dy)
        largest = given.dy.double().abs().amax() if dx.numel() else None
        close(dresidual, TRUTH.backward_residual(*wide), ROUNDING[case.dtype], largest)


def forward_inputs(case: Case, device: str = "cpu") -> tuple[Inputs, Fused]:
    """The case, and what the layer hands to forward for it."""
    given = inputs(case, device)
    return given, Fused(case.act, given.residual, given.mask)


def backward_inputs(case: Case, device: str = "cpu") -> tuple[Inputs, Fused]:
    """The case with no gradient where the derivative jumps, and what the layer hands to backward for it."""
    given = inputs(case, device)
    affine, forward = _double(given, case, None)
    z = TRUTH.normalize(given.x.double(), affine, forward._replace(act=None))
    for kink in KINKS:
        given.dy.masked_fill_((z - kink).abs() < 1e-2, 0)
    fused = Fused(case.act, mask=given.mask)
    if case.act is not None and given.residual is not None:
        if ACTIVATIONS[case.act].from_output:
            y = TRUTH.normalize(given.x.double(), affine, forward)
            output = torch.empty_like(given.x).copy_(y)
            fused = fused._replace(output=output)
        else:
            fused = fused._replace(residual=given.residual)
    return given, fused


def check_far_mean(kernels: Kernels, mean: float, spread: float, case: Case) -> None:
    """The variance survives a mean that is large against it, which E[x^2] - E[x]^2 in float32 does not."""
    x = inputs(case).x.double() * spread + mean
    x = _laid_out(x.to(case.dtype), case)
    packed = unpack(kernels.moments(x, None)[None])
    expected = unpack(TRUTH.moments(x.double(), None)[None])
    close(packed.mean, expected.mean, 2e-7)
    assert ((packed.M2 / expected.M2) - 1).abs().max() < 1e-4


def check_deterministic(kernels: Kernels, case: Case, device: str = "cpu") -> None:
    """The same bits from the same input."""
    given, fused = backward_inputs(case, device)

    def everything() -> list[Tensor]:
        sums = kernels.backward_sums(given.dy, given.x, given.affine, fused)
        total = torch.full((), 7.0, dtype=torch.float64, device=device)
        return [
            kernels.moments(given.x, given.mask),
            kernels.normalize(given.x, given.affine, Fused(case.act, given.residual, given.mask)),
            sums,
            kernels.backward_input(given.dy, given.x, given.affine, fused, sums, total),
        ]

    for first, second in zip(everything(), everything(), strict=True):
        assert torch.equal(first, second)


def check_merge(
    kernels: Kernels, counts: list[int], channels: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """W ranks' moments become those of the union, empty ranks left out."""
    generator = torch.Generator().manual_seed(len(counts))
    ranks = []
    for count in counts:
        mean = torch.randn(channels, generator=generator, dtype=torch.float64) + 30
        M2 = torch.rand(channels, generator=generator, dtype=torch.float64) * count
        ranks.append(pack(Moments(torch.tensor(float(count), dtype=torch.float64), mean, M2)))
    packed = torch.stack(ranks).to(device, dtype)
    merged = kernels.merge(packed, 1e-5)
    truth = TRUTH.merge(packed.double(), 1e-5)
    assert merged.total.dtype == torch.float64
    assert merged.total.shape == ()
    assert float(merged.total) == sum(counts)
    for name in ("mean", "var", "invstd"):
        assert getattr(merged, name).dtype == dtype
        close(getattr(merged, name), getattr(truth, name), 1e-12 if dtype.itemsize == 8 else 3e-7)


def check_update(
    kernels: Kernels, total: float, momentum: float | None, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Running statistics move as in EagerKernels, and autograd is told that they were written."""
    generator = torch.Generator().manual_seed(1)
    mean, var, running_mean, running_var = torch.rand(4, 11, generator=generator).to(device)
    count = torch.full((), total, dtype=torch.float64, device=device)
    statistics = Statistics(count, mean, var, torch.rsqrt(var))
    for tracked in (torch.full((), 3, device=device), None)[: 1 if momentum is None else 2]:
        ours = Running(running_mean.to(dtype), running_var.to(dtype), tracked, momentum)
        ours, truth = (_clones(ours) for _ in range(2))
        versions = [ours.mean._version, ours.var._version]
        kernels.update(ours, statistics)
        TRUTH.update(truth, statistics)
        bound = 1e-12 if dtype == torch.float64 else ROUNDING[dtype]
        close(ours.mean, truth.mean.double(), max(bound, 2e-7))
        close(ours.var, truth.var.double(), max(bound, 2e-7))
        assert (ours.num_batches_tracked is None) == (tracked is None)
        assert (
            ours.num_batches_tracked is None
            or ours.num_batches_tracked == truth.num_batches_tracked
        )
        assert ours.mean._version > versions[0]
        assert ours.var._version > versions[1]


def everything(kernels: Kernels, case: Case) -> list[Tensor]:
    """All that kernels compute of a case."""
    given, fused = backward_inputs(case)
    sums = kernels.backward_sums(given.dy, given.x, given.affine, fused)
    total = torch.full((), 7.0, dtype=torch.float64)
    return [
        kernels.moments(given.x),
        kernels.normalize(given.x, given.affine, Fused(case.act, given.residual)),
        sums,
        kernels.backward_input(given.dy, given.x, given.affine, fused, sums, total),
        kernels.backward_residual(given.dy, given.x, given.affine, fused),
    ]


def close(actual: Tensor, expected: Tensor, bound: float, scale: Tensor | None = None) -> None:
    """Assert an error within `bound` of the largest expected magnitude, or of `scale`."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if not expected.numel():
        return
    error = (actual.double() - expected).abs()
    scale = expected.abs().max() if scale is None else scale
    worst = float((error / scale.clamp(min=1e-300)).nan_to_num(0, posinf=torch.inf).max())
    assert worst <= bound, f"relative error {worst:.2e} is over {bound:.0e}"
    assert actual.isfinite().all()


def _laid_out(values: Tensor, case: Case) -> Tensor:
    """A copy in the case's memory format that starts `case.offset` elements into its storage."""
    layout = torch.contiguous_format
    if case.channels_last:
        layout = FORMATS.get(values.dim(), torch.contiguous_format)
    values = values.contiguous(memory_format=layout)
    storage = values.new_empty(values.numel() + case.offset)
    return storage.as_strided(values.shape, values.stride(), case.offset).copy_(values)


def _double(given: Inputs, case: Case, fused: Fused | None) -> tuple[Affine, Fused]:
    fused = fused or Fused(case.act, given.residual, given.mask)
    wide = [None if values is None else values.double() for values in given.affine]
    residual = None if fused.residual is None else fused.residual.double()
    output = None if fused.output is None else fused.output.double()
    return Affine(*wide), fused._replace(residual=residual, output=output)  # pyright: ignore


def _sum_scale(dy: Tensor, x: Tensor, affine: Affine) -> Tensor:
    """The sums of magnitudes, against which the rounding of a sum is measured; |act'| is at most about 1."""
    xhat = TRUTH.normalize(x, Affine(affine.mean, affine.invstd), Fused()).abs()
    dims = [dim for dim in range(x.dim()) if dim != 1]
    return torch.stack([dy.abs().sum(dims), (dy.abs() * xhat).sum(dims)])


def _largest_term(dy: Tensor, x: Tensor, affine: Affine, means: Tensor) -> Tensor:
    """The largest term of dx, against which its rounding is measured: they may cancel."""
    xhat = TRUTH.normalize(x, Affine(affine.mean, affine.invstd), Fused()).abs()
    scale = affine.invstd if affine.weight is None else affine.invstd * affine.weight
    terms = dy.abs().amax() + means[0].abs().amax() + xhat.amax() * means[1].abs().amax()
    return scale.abs().amax() * terms


def _clones(running: Running) -> Running:
    tracked = running.num_batches_tracked
    return Running(
        running.mean.clone(),
        running.var.clone(),
        None if tracked is None else tracked.clone(),
        running.momentum,
    )


def _assert_like(result: Tensor, x: Tensor) -> None:
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    layout = FORMATS.get(x.dim(), torch.contiguous_format)
    for memory_format in (torch.contiguous_format, layout):
        # sizes of 0 and 1 leave strides open, and operations of torch differ in what they choose
        if min(x.shape) > 1 and x.is_contiguous(memory_format=memory_format):
            assert result.is_contiguous(memory_format=memory_format)
