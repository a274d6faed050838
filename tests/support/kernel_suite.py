"""What every backend must do: one suite of checks, with AtenBackend in float64 as the truth.

A test file parametrises the checks over its backends and passes them `Case`s; which cases there are is a hypothesis
strategy here, so that all backends are given the same inputs. The truth is computed from the values the backend got.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import Backend, NormArgs, Running
from syncbn.norm.moments import Moments, Statistics, Stats, pack, unpack

TRUTH = AtenBackend()
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
    """The tensors of a case: the gradient of y, the operands of a pass, and statistics to normalise with."""

    dy: Tensor
    args: NormArgs
    stats: Statistics

    def double(self) -> "Inputs":
        """The same values in float64."""
        args = self.args
        operands = [None if t is None else t.double() for t in args[:4]]
        output = None if args.output is None else args.output.double()
        args = NormArgs(*operands, *args[4:10], output)  # pyright: ignore
        return Inputs(self.dy.double(), args, Statistics(*(t.double() for t in self.stats)))


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Of 2 to 5 dimensions, empty batches, single channels and sizes divisible by nothing among them."""
    batch, channels = st.integers(0, 9), st.integers(1, 40)
    sizes = {2: 1, 3: 70, 4: 9, 5: 5}
    return st.integers(2, 5).flatmap(
        lambda dims: st.tuples(batch, channels, *[st.integers(1, sizes[dims])] * (dims - 2))
    )


def cases(dtypes: tuple[torch.dtype, ...] = tuple(ROUNDING)) -> st.SearchStrategy[Case]:
    """Every combination of what backends take."""
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


def forward_inputs(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of `case`, on `device`, as a forward pass takes them."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def laid_out() -> Tensor:
        return _laid_out(random(*case.shape).to(case.dtype), case).to(device)

    channels = case.shape[1]
    weight = bias = None
    if case.parameters is not None:
        weight, bias = (random(channels).to(device, case.parameters) for _ in range(2))
    mean, invstd = random(channels), random(channels).exp()
    mask = None
    if case.masked:
        mask = torch.rand(case.shape[0], 1, *case.shape[2:], generator=generator) < 0.6
        mask = mask.to(device)
    x, dy = laid_out(), laid_out()
    args = NormArgs(x, weight, bias, laid_out() if case.residual else None, mask, case.act)
    total = torch.full((), max(x.numel() // channels, 1), dtype=torch.float64, device=device)
    dtype = torch.promote_types(case.dtype, torch.float32)
    per_channel = (values.to(device, dtype) for values in (mean, invstd**-2, invstd))
    return Inputs(dy, args, Statistics(total, *per_channel))


def backward_inputs(case: Case, device: str = "cpu") -> Inputs:
    """The same as a backward pass takes them, with no gradient where the derivative jumps."""
    given = forward_inputs(case, device)
    dy, args, _ = given
    _, wide, stats = given.double()
    z = TRUTH.normalize(wide._replace(act=None), stats)
    for kink in KINKS:
        dy.masked_fill_((z - kink).abs() < 1e-2, 0)
    residual = output = None
    if case.act is not None and args.residual is not None:
        if ACTIVATIONS[case.act].from_output:
            output = torch.empty_like(args.x).copy_(TRUTH.normalize(wide, stats))
        else:
            residual = args.residual
    return given._replace(args=args._replace(residual=residual, output=output))


def check_local_stats(backend: Backend, case: Case, device: str = "cpu") -> None:
    """Count, mean and M2 are those of the values where the mask is true."""
    given = forward_inputs(case, device)
    x = given.args.x
    packed = serving(backend, given.args).local_stats(given.args)
    expected = TRUTH.local_stats(given.double().args)
    assert packed.dtype == given.stats.mean.dtype
    assert packed.shape == expected.shape
    assert torch.equal(packed[:2].double(), expected[:2])
    bound = 1e-11 if case.dtype == torch.float64 else 2e-6
    _, mean, M2 = unpack(packed[None])
    _, true_mean, true_M2 = unpack(expected[None])
    close(mean, true_mean, bound, x.double().abs().amax() if x.numel() else None)
    close(M2, true_M2, bound)


def check_normalize(backend: Backend, case: Case, device: str = "cpu") -> None:
    """act((x - mean) * invstd * weight + bias + residual), in the dtype and layout of x."""
    given = forward_inputs(case, device)
    _, args, stats = given
    y = serving(backend, args).normalize(args, stats)
    truth = TRUTH.normalize(*given.double()[1:])
    _assert_like(y, args.x)
    terms = [t for t in (truth, args.bias, args.residual) if t is not None and t.numel()]
    largest = torch.stack([t.double().abs().max() for t in terms]).max() if y.numel() else None
    close(y, truth, ROUNDING[case.dtype], largest)


def check_backward(backend: Backend, case: Case, device: str = "cpu") -> None:
    """Both sums, the gradient of the input and that of the residual."""
    given = backward_inputs(case, device)
    dy, args, stats = given
    wide = given.double()
    backend = serving(backend, args)
    exact = stats.mean.dtype == torch.float64
    sums, nothing = backend.local_grad_sums(dy, args, stats)
    assert nothing is None
    assert sums.dtype == stats.mean.dtype
    assert sums.shape == (2, case.shape[1])
    close(sums, TRUTH.local_grad_sums(*wide)[0], 1e-11 if exact else 4e-6, _sum_scale(wide))
    ranks = torch.stack([sums.view(-1), -0.5 * sums.view(-1)])
    dx = backend.finish_backward(dy, args, stats, ranks)
    _assert_like(dx, args.x)
    largest = _largest_term(wide, ranks.double().sum(0) / stats.total) if dx.numel() else None
    expected = TRUTH.finish_backward(*wide, ranks.double())
    close(dx, expected, ROUNDING[case.dtype], largest)
    largest = dy.double().abs().amax() if dx.numel() else None
    dz = backend.grad_residual(dy, args, stats)
    close(dz, TRUTH.grad_residual(*wide), ROUNDING[case.dtype], largest)
    if case.act is not None or case.masked:
        _assert_like(dz, args.x)
    else:
        assert dz is dy
    both, same = backend.local_grad_sums(dy, args, stats, needs_dz=True)
    assert same is not None
    assert torch.equal(same, dz)
    # a backend may add dz before or after its rounding
    largest = _sum_scale(wide)
    close(both, TRUTH.local_grad_sums(*wide)[0], max(ROUNDING[case.dtype], 4e-6), largest)


def check_finish_forward(backend: Backend, case: Case, device: str = "cpu") -> None:
    """`finish_forward` gives the statistics of a rank without samples, and the bits that `normalize` gives of them."""
    _, args, _ = forward_inputs(case, device)
    args = args._replace(world_size=2)
    backend = serving(backend, args)
    others = args._replace(x=args.x * 0.5 + 1)
    gathered = torch.stack([backend.local_stats(args), backend.local_stats(others)])
    buffers = torch.ones(2, case.shape[1], device=device)
    counted = torch.full((), 3, device=device)
    one = Running(*buffers, counted, (0.1, None)[case.seed % 2])
    other = clones(one)
    bits = _marked(backend, args)
    y, stats = backend.finish_forward(args._replace(running=one, bits=bits), gathered)
    expected = merged(backend, gathered, args.eps, other)
    own_bits = _marked(backend, args)
    expected_y = backend.normalize(args._replace(bits=own_bits), expected)
    assert same_bits([y], [expected_y])
    names = ("total", "mean", "var", "invstd")
    assert same_bits([getattr(stats, n) for n in names], [getattr(expected, n) for n in names])
    assert same_bits(list(one[:3]), list(other[:3]))
    if bits is not None and own_bits is not None:
        assert torch.equal(bits, own_bits)


def check_far_mean(backend: Backend, mean: float, spread: float, case: Case) -> None:
    """The variance survives a mean that is large against it, which E[x^2] - E[x]^2 in float32 does not."""
    x = forward_inputs(case).args.x.double() * spread + mean
    args = NormArgs(_laid_out(x.to(case.dtype), case))
    packed = unpack(serving(backend, args).local_stats(args)[None])
    expected = unpack(TRUTH.local_stats(NormArgs(args.x.double()))[None])
    close(packed.mean, expected.mean, 2e-7)
    assert ((packed.M2 / expected.M2) - 1).abs().max() < 1e-4


def check_deterministic(backend: Backend, case: Case, device: str = "cpu") -> None:
    """The same bits from the same input."""
    assert same_bits(everything(backend, case, device), everything(backend, case, device))


def check_merge(
    backend: Backend, counts: list[int], channels: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """W ranks' moments become those of the union, empty ranks left out."""
    generator = torch.Generator().manual_seed(len(counts))
    ranks = []
    for count in counts:
        mean = torch.randn(channels, generator=generator, dtype=torch.float64) + 30
        M2 = torch.rand(channels, generator=generator, dtype=torch.float64) * count
        ranks.append(pack(Moments(torch.tensor(float(count), dtype=torch.float64), mean, M2)))
    packed = torch.stack(ranks).to(device, dtype)
    stats, truth = merged(backend, packed), merged(TRUTH, packed.double())
    assert stats.total.dtype == torch.float64
    assert stats.total.shape == ()
    assert float(stats.total) == sum(counts)
    for name in ("mean", "var", "invstd"):
        assert getattr(stats, name).dtype == dtype
        close(getattr(stats, name), getattr(truth, name), 1e-12 if dtype.itemsize == 8 else 3e-7)


def check_update(
    backend: Backend, total: float, momentum: float | None, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Running statistics move as in AtenBackend, and autograd is told that they were written."""
    generator = torch.Generator().manual_seed(1)
    mean, var, running_mean, running_var = torch.rand(4, 11, generator=generator).to(device)
    count = torch.full((), total, dtype=torch.float64, device=device)
    packed = pack(Moments(count, mean, var * total)).unsqueeze(0)
    for tracked in (torch.full((), 3, device=device), None)[: 1 if momentum is None else 2]:
        ours = Running(running_mean.to(dtype), running_var.to(dtype), tracked, momentum)
        ours, truth = (clones(ours) for _ in range(2))
        versions = [ours.mean._version, ours.var._version]
        if total == 1:  # refused, and nothing moves
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                merged(backend, packed, running=ours)
            assert same_bits(list(ours[:2]), list(truth[:2]))
            assert ours.num_batches_tracked == truth.num_batches_tracked
            continue
        merged(backend, packed, running=ours)
        merged(TRUTH, packed, running=truth)
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


def everything(backend: Backend, case: Case, device: str = "cpu") -> list[Tensor]:
    """All that a backend computes of a case."""
    _, forward, _ = forward_inputs(case, device)
    dy, args, stats = backward_inputs(case, device)
    backend = serving(backend, args)
    sums, dz = backend.local_grad_sums(dy, args, stats, needs_dz=True)
    assert dz is not None
    return [
        backend.local_stats(forward),
        backend.normalize(forward, stats),
        backend.local_grad_sums(dy, args, stats)[0],
        sums,
        dz,
        backend.finish_backward(dy, args, stats, sums.view(1, -1)),
        backend.grad_residual(dy, args, stats),
    ]


def merged(
    backend: Backend, gathered: Tensor, eps: float = 1e-5, running: Running | None = None
) -> Stats:
    """The statistics of packed moments, as a rank without samples finds them; moves `running`."""
    x = gathered.new_empty(0, gathered.shape[1] // 2 - 1)
    args = NormArgs(x, eps=eps, running=running, world_size=2)
    y, stats = serving(backend, args).finish_forward(args, gathered)
    assert y.shape == x.shape
    return stats


def serving(backend: Backend, args: NormArgs) -> Backend:
    """The backend that `backend` chooses for a pass of this rank alone."""
    return backend.for_pass(args)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all values are equal, NaN to NaN."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


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


def clones(running: Running) -> Running:
    """The same running statistics in memory of their own."""
    mean, var, tracked, momentum = running
    return Running(
        mean.clone(), var.clone(), None if tracked is None else tracked.clone(), momentum
    )


def _marked(backend: Backend, args: NormArgs) -> Tensor | None:
    """Memory for the bits of a pass, none of which is right yet."""
    bits = backend.empty_bits(args)
    return None if bits is None else bits.fill_(0xAA)


def _laid_out(values: Tensor, case: Case) -> Tensor:
    """A copy in the case's memory format that starts `case.offset` elements into its storage."""
    layout = torch.contiguous_format
    if case.channels_last:
        layout = FORMATS.get(values.dim(), torch.contiguous_format)
    values = values.contiguous(memory_format=layout)
    storage = values.new_empty(values.numel() + case.offset)
    return storage.as_strided(values.shape, values.stride(), case.offset).copy_(values)


def _xhat_of(wide: Inputs) -> Tensor:
    return TRUTH.normalize(NormArgs(wide.args.x), wide.stats).abs()


def _sum_scale(wide: Inputs) -> Tensor:
    """The sums of magnitudes, against which the rounding of a sum is measured; |act'| is at most about 1."""
    dims = [dim for dim in range(wide.dy.dim()) if dim != 1]
    dy = wide.dy.abs()
    return torch.stack([dy.sum(dims), (dy * _xhat_of(wide)).sum(dims)])


def _largest_term(wide: Inputs, means: Tensor) -> Tensor:
    """The largest term of dx, against which its rounding is measured: they may cancel."""
    invstd, weight = wide.stats.invstd, wide.args.weight
    scale = invstd if weight is None else invstd * weight
    mean_dz, mean_dz_xhat = (part.abs().amax() for part in means.chunk(2))
    terms = wide.dy.abs().amax() + mean_dz + _xhat_of(wide).amax() * mean_dz_xhat
    return scale.abs().amax() * terms


def _assert_like(result: Tensor, x: Tensor) -> None:
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    layout = FORMATS.get(x.dim(), torch.contiguous_format)
    for memory_format in (torch.contiguous_format, layout):
        # sizes of 0 and 1 leave strides open, and operations of torch differ in what they choose
        if min(x.shape) > 1 and x.is_contiguous(memory_format=memory_format):
            assert result.is_contiguous(memory_format=memory_format)
