"""The Triton kernels as machine code for a GPU, which their compiler makes without one.

The interpreter accepts what the compiler refuses, and says nothing of how memory is read.
"""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_suite import FORMATS, Case, Inputs

from syncbn.norm.backends.base import NormArgs, Running
from syncbn.norm.moments import Statistics

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("test_gpu.py runs the kernels themselves", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from syncbn.norm.backends.triton import backend as module  # noqa: E402
from syncbn.norm.backends.triton.tile_plan import ELEMENTWISE, REDUCTION, Tuning, tile_plan  # noqa: E402

pytestmark = pytest.mark.untraced
HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list:
    """What would be launched, as (kernel, arguments)."""
    seen = []

    def note(kernel, _grid, tensors, numbers, statics) -> None:
        seen.append((kernel, (*tensors, *numbers, *statics[:-1]), statics[-1]))

    monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(module, "kernels_may_write", lambda running: True)  # tensors without values
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return seen


def ptx(kernel, arguments, num_warps: int) -> str:
    """The assembly of one launch, with the types and hints that Triton would derive from its arguments."""
    signature, constants, hints = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert parameter.do_not_specialize, "another kernel for every size"
            signature[parameter.name] = "i64" if value >= 2**31 else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"enable_fp_fusion": False, "num_warps": num_warps}
    return triton.compile(source, target=HOPPER, options=options).asm["ptx"]


def inputs(case: Case) -> Inputs:
    """Of the shapes and dtypes of a case, without values."""
    layout = FORMATS[4] if case.channels_last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=case.dtype, device="meta", memory_format=layout)
    mean = x.new_empty(case.shape[1], dtype=torch.promote_types(case.dtype, torch.float32))
    weight = x.new_empty(case.shape[1], dtype=case.parameters)
    mask = x.new_empty(case.shape[0], 1, *case.shape[2:], dtype=torch.bool)
    args = NormArgs(
        x, weight, weight, x if case.residual else None, mask if case.masked else None, case.act
    )
    return Inputs(x, args, Statistics(mean.new_empty((), dtype=torch.float64), mean, mean, mean))


def launch_everything(case: Case) -> None:
    backend, given = module.TritonBackend(), inputs(case)
    _, args, stats = given
    gathered = backend.local_stats(args)[None]
    buffers = torch.empty(2, case.shape[1], dtype=case.parameters, device="meta")
    running = Running(*buffers, torch.empty((), dtype=torch.int64, device="meta"), 0.1)
    backend.normalize(args, stats)
    for pass_args in (args, args._replace(mask=None)):
        backend.finish_forward(pass_args._replace(running=running), gathered)
    sums, _ = backend.local_grad_sums(*given)
    backend.finish_backward(*given, sums.view(1, -1))
    backend.local_grad_sums(*given, needs_dz=True)
    backend.grad_residual(*given)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((32, 64, 56, 56), torch.float32, act="relu"), marks=pytest.mark.slow),
        Case((32, 64, 14, 14), torch.bfloat16, channels_last=True, act="relu6", residual=True),
        Case((8, 12, 7, 7), torch.float16, torch.float16, act="silu", residual=True, masked=True),
        pytest.param(
            Case((9, 13), torch.float64, torch.float64, act="hardswish", masked=True),
            marks=pytest.mark.slow,
        ),
        Case((2**31, 16), torch.bfloat16, torch.bfloat16, act="leaky_relu"),
    ],
    ids=str,
)
def test_every_kernel_compiles(launches: list, case: Case):
    launch_everything(case)
    assert len(launches) >= 8
    for kernel, *launch in launches:
        assert ".visible .entry" in ptx(kernel, *launch), kernel.__name__


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        (Case((8, 64, 56, 56), torch.float32), 128),
        (Case((8, 64, 56, 56), torch.bfloat16), 128),
        (Case((8, 64, 14, 14), torch.float32), 128),
        (Case((8, 64, 14, 14), torch.bfloat16), 64),
        (Case((8, 64, 7, 7), torch.float32, channels_last=True), 128),
        (Case((8, 64, 7, 7), torch.bfloat16, channels_last=True), 128),
    ],
    ids=str,
)
def test_memory_is_read_and_written_in_wide_accesses(launches: list, case: Case, bits: int):
    given = inputs(case)
    module.TritonBackend().normalize(given.args, given.stats)
    code = ptx(*launches[0])
    accesses = re.findall(r"\b(?:ld\.global.*evict_first\S*|st\.global\S*)", code)
    assert accesses
    assert all(f"v{bits // 32}.b32" in access for access in accesses), accesses


counts = st.integers(1, 2**33)


@given(
    counts,
    st.integers(1, 2**20),
    counts,
    st.booleans(),
    st.sampled_from([REDUCTION, ELEMENTWISE]),
    st.integers(1, 200),
)
def test_programs_share_all_steps_and_offsets_in_a_tile_fit_32_bits(
    images: int, channels: int, positions: int, channels_last: bool, tuning: Tuning, processors: int
):
    plan = tile_plan(images, channels, positions, channels_last, tuning, processors)
    _, _, steps, of_a_program = plan.sizes
    height, width, vector, _ = plan.shape
    blocks, shares = plan.grid
    assert (blocks - 1) * height < channels <= blocks * height
    assert (shares - 1) * of_a_program < steps <= shares * of_a_program
    assert steps == images * -(-positions // width)
    assert (channels if channels_last else positions) % vector == 0
    assert height * width <= tuning.values
    farthest = width * channels if channels_last else (height - 1) * positions
    assert farthest < 2**31


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1, 1.0])
def test_eps_reaches_float64_statistics_whole(launches: list, eps: float):
    """Triton hands a Python float over as float32."""
    gathered = torch.empty(2, 8, dtype=torch.float64, device="meta")
    module.TritonBackend().finish_forward(NormArgs(gathered[:, :3], eps=eps), gathered)
    handed = [torch.tensor(v).float().double() for v in launches[0][1] if isinstance(v, float)]
    assert abs(sum(handed) / eps - 1) < 1e-14
