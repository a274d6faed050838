"""The CPU backend: native kernels in C++, and a whole pass, its exchange included, in one native call.

* Each pass reads memory as often as it must and no more. Results have the same bits with any number of threads and
  on any instruction set: sums are cut and ordered by the shape alone.
* Alone, and among ranks that share memory, a pass is one native call: the steps one by one cost 250 us of Python a
  layer and training step, more than small layers take. Elsewhere a second call follows the exchange.
* Masks, mixed dtypes and empty batches go to `CpuFallback`, which is ATen but for the per-channel arithmetic.
* Large results use the memory of the last step's (`native/allocator`): glibc gives large blocks back to the kernel at
  once, and page faults then cost more than the passes over memory (8x64x56x56 in float32, forward and backward: 2.5 ms,
  and 9 ms with 3100 faults).
"""

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.dlpack import from_dlpack

from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.aten import AtenBackend, update
from syncbn.norm.backends.base import (
    Backend,
    NormArgs,
    Running,
    check_statistics,
    kernels_may_read,
    kernels_may_write,
)
from syncbn.norm.comm.exchange import NO_TURN, Exchange
from syncbn.norm.comm.fingerprint import BACKWARD, FORWARD, Fingerprint
from syncbn.norm.comm.transports.shared_memory import ELSEWHERE, LOOK_NS
from syncbn.norm.moments import Statistics, Stats, stats_dtype
from syncbn.norm.native import library

SMALLEST_KEPT_BYTES = 1 << 18
"""Below it glibc keeps what is freed, and PyTorch's own allocation is shorter."""

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_MOMENTS, _NORMALIZE, _BACKWARD_SUMS, _BACKWARD_INPUT, _BACKWARD_RESIDUAL = range(5)
_NOTHING, _RESIDUAL, _OUTPUT = range(3)

_PASS = struct.Struct("8q9P")
"""The arguments of one pass, as in native/kernels; packing is faster than a ctypes.Structure."""
_FUSED_PASS = struct.Struct("8q9P2P2qdP3Pdq")
"""The same, then what a whole pass needs beside them."""
_NO_RUNNING = (0, 0, 0, 0.0, 0)


class Geometry(NamedTuple):
    """What inputs of one shape, layout and dtype have in common.

    Attributes:
        memory_format: in which the library reads them.
        words: dtype, samples, channels and values per channel, as the library takes them.
        num_channels: C.
        dtype: of the statistics.
        moments_bytes: of one rank's packed moments.
    """

    memory_format: torch.memory_format
    words: tuple[int, int, int, int]
    num_channels: int
    dtype: torch.dtype
    moments_bytes: int


@functools.lru_cache(maxsize=4096)
def geometry_of(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Geometry:
    """The geometry of inputs of this shape, which are not empty, once they are contiguous in their memory format."""
    samples, channels = shape[:2]
    size = math.prod(shape[2:])
    memory_format = _CHANNELS_LAST.get(len(shape), torch.contiguous_format)
    # a single channel is both: then it is told by what follows
    if len(shape) in _CHANNELS_LAST and stride[1] == 1 and channels > 1 and size > 1:
        samples, size = samples * size, 1
    else:
        memory_format = torch.contiguous_format
    words, kept = (_DTYPES[dtype], samples, channels, size), stats_dtype(dtype)
    return Geometry(memory_format, words, channels, kept, (2 + 2 * channels) * kept.itemsize)


class StatisticsBlock:
    """What a whole pass finds, in one piece of memory: this rank's packed moments, and the statistics of all ranks.

    Tensors of them are made on demand: most passes need addresses alone, and seven small tensors cost 15 us.

    Args:
        geometry: of the pass.
    """

    __slots__ = ("__weakref__", "_num_channels", "_values")

    def __init__(self, geometry: Geometry) -> None:
        self._num_channels = geometry.num_channels
        size = 8 // geometry.dtype.itemsize + 2 + 5 * geometry.num_channels
        self._values = torch.empty(size, dtype=geometry.dtype, device="cpu")

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of the total, the packed moments, mean, var and invstd, where their memory lies now."""
        total, item = self._values.data_ptr(), self._values.itemsize
        row = self._num_channels * item
        mean = total + 8 + 2 * item + 2 * row
        return total, total + 8, mean, mean + row, mean + 2 * row

    @property
    def packed(self) -> Tensor:
        """This rank's packed moments, `(2 + 2C,)`."""
        first = 8 // self._values.itemsize
        return self._values[first : first + 2 + 2 * self._num_channels]

    @property
    def total(self) -> Tensor:
        """As of `Statistics`, like the following."""
        return self._values[: 8 // self._values.itemsize].view(torch.float64).squeeze(0)

    @property
    def mean(self) -> Tensor:
        """`(C,)`."""
        return self._rows()[0]

    @property
    def var(self) -> Tensor:
        """`(C,)`."""
        return self._rows()[1]

    @property
    def invstd(self) -> Tensor:
        """`(C,)`."""
        return self._rows()[2]

    def _rows(self) -> Tensor:
        return self._values[-3 * self._num_channels :].view(3, -1)


class CpuFallback(AtenBackend):
    """ATen over the input, native code per channel: for CPU passes that the kernels do not serve."""

    def __init__(self) -> None:
        found = library()
        if found is None:
            raise RuntimeError("the native library of syncbn was not built; see syncbn.norm.native")
        self._library = found

    def local_stats(self, args: NormArgs) -> Tensor:
        """Count, mean and M2 per channel; x is read once where there is no mask."""
        if args.mask is not None or not _has_kernels(args.x):
            return super().local_stats(args)
        geometry = _geometry(args.x)
        packed = torch.empty(2 + 2 * geometry.num_channels, dtype=geometry.dtype, device="cpu")
        self._run(_MOMENTS, args, geometry, packed)
        return packed

    def finish_forward(self, args: NormArgs, gathered: Tensor) -> tuple[Tensor, Stats]:
        """Merge and update in the native call for a batch without samples, then normalise."""
        nothing = torch.empty((0, args.x.shape[1]), dtype=gathered.dtype, device="cpu")
        without = args._replace(x=nothing, weight=None, bias=None, residual=None, act=None)
        _, stats = _kernels().finish_forward(without, gathered)
        return self.normalize(args, stats), stats

    def local_grad_sums(
        self, dy: Tensor, args: NormArgs, stats: Stats, needs_dz: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of dz, and sum of dz * xhat, per channel; by the kernels once dz is there, if only act kept them out."""
        if not needs_dz:
            return super().local_grad_sums(dy, args, stats)
        dz, args = self.grad_residual(dy, args, stats), args.before_act()
        backend = _kernels() if _kernels_serve(args) else super()
        return backend.local_grad_sums(dz, args, stats)[0], dz

    def finish_backward(self, dy: Tensor, args: NormArgs, stats: Stats, gathered: Tensor) -> Tensor:
        """dx; by the kernels as in `local_grad_sums`."""
        backend = _kernels() if _kernels_serve(args) else super()
        return backend.finish_backward(dy, args, stats, gathered)

    def _run(
        self,
        kind: int,
        args: NormArgs,
        geometry: Geometry,
        result: Tensor,
        stats: Stats | None = None,
        dy: Tensor | None = None,
    ) -> None:
        """One pass of the library over x."""
        args = _aligned(args, geometry)
        dy = None if dy is None else _like(dy, geometry)
        addresses = (0,) * 5 if stats is None else _addresses(stats)
        words = _pass_words(kind, args, geometry, _address(dy), addresses, result)
        self._library.syncbn_pass(_PASS.pack(*words))


class CpuBackend(CpuFallback):
    """Native kernels, for plain CPU tensors of one floating dtype, without a mask; see `for_pass`.

    Raises:
        RuntimeError: there is no native library.
    """

    fused = True

    def for_pass(self, args: NormArgs) -> Backend:
        """See `Backend`."""
        if _kernels_serve(args):
            return self
        return _fallback() if kernels_may_read(args.x) else _ATEN

    def normalize(self, args: NormArgs, stats: Stats) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual); x is read once."""
        geometry = _geometry(args.x)
        y = _empty(args.x, geometry)
        self._run(_NORMALIZE, args, geometry, y, stats)
        return y

    def finish_forward(self, args: NormArgs, gathered: Tensor) -> tuple[Tensor, Stats]:
        """Merge, update and normalise in one native call."""
        geometry = _geometry(args.x)
        args, block = _aligned(args, geometry), StatisticsBlock(geometry)
        y, moved = _empty(args.x, geometry), _moved_by_library(args.running)
        ring = 0 if args.world_size == 1 else ELSEWHERE
        words = _forward_words(args, geometry, y, block, moved, ring)
        _settle(self._finish(words, gathered), gathered, args, block, moved)
        return y, block

    def local_grad_sums(
        self, dy: Tensor, args: NormArgs, stats: Stats, needs_dz: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of dz, and sum of dz * xhat, per channel; x and dy are read once."""
        dz = None
        if needs_dz:
            dy = dz = self.grad_residual(dy, args, stats)
            args = args.before_act()
        geometry = _geometry(args.x)
        sums = torch.empty(2, geometry.num_channels, dtype=geometry.dtype, device="cpu")
        self._run(_BACKWARD_SUMS, args, geometry, sums, stats, dy)
        return sums, dz

    def finish_backward(self, dy: Tensor, args: NormArgs, stats: Stats, gathered: Tensor) -> Tensor:
        """dx, and the sums of all ranks on the way to it, in one native call."""
        geometry = _geometry(args.x)
        args, dy = _aligned(args, geometry), _like(dy, geometry)
        dx = _empty(args.x, geometry)
        words = _backward_words(dy, args, geometry, stats, (dx, None), ELSEWHERE)
        self._finish(words, gathered)
        return dx

    def grad_residual(self, dy: Tensor, args: NormArgs, stats: Stats) -> Tensor:
        """The gradient of the residual; dy itself where no activation intervenes."""
        if args.act is None:
            return dy
        geometry = _geometry(args.x)
        dz = _empty(args.x, geometry)
        self._run(_BACKWARD_RESIDUAL, args, geometry, dz, stats, dy)
        return dz

    def fused_forward(
        self, args: NormArgs, exchange: Exchange | None, what: Fingerprint
    ) -> tuple[Tensor, Stats]:
        """The output and the statistics of all ranks; errors as in `finish_forward`."""
        geometry = _geometry(args.x)
        args, block = _aligned(args, geometry), StatisticsBlock(geometry)
        y, moved, gathered = _empty(args.x, geometry), _moved_by_library(args.running), None
        ring, turn = 0, NO_TURN
        if exchange is not None:
            ring, turn = exchange.announce_native(FORWARD, geometry.moments_bytes, what)
        words = _forward_words(args, geometry, y, block, moved, ring, turn[1])
        status = self._library.syncbn_fused_pass(words, turn[0])
        if exchange is not None:
            if status:
                gathered = exchange.complete(block.packed, FORWARD, what, status, turn)
                status = self._finish(words, gathered)
            if what.serial not in exchange.serials.codes:
                exchange.serials.keep(what.serial)
        _settle(status, gathered, args, block, moved)
        return y, block

    def fused_backward(
        self,
        dy: Tensor,
        args: NormArgs,
        stats: Stats,
        exchange: Exchange | None,
        what: Fingerprint,
    ) -> tuple[Tensor, Tensor]:
        """Dx and this rank's `local_grad_sums`."""
        geometry = _geometry(args.x)
        args, dy = _aligned(args, geometry), _like(dy, geometry)
        dx = _empty(args.x, geometry)
        sums = torch.empty(2, geometry.num_channels, dtype=geometry.dtype, device="cpu")
        ring, turn = 0, NO_TURN
        if exchange is not None:
            ring, turn = exchange.announce_native(BACKWARD, sums.nbytes, what)
        words = _backward_words(dy, args, geometry, stats, (dx, sums), ring, turn[1])
        status = self._library.syncbn_fused_pass(words, turn[0])
        if status and exchange is not None:
            gathered = exchange.complete(sums.view(-1), BACKWARD, what, status, turn)
            self._finish(words, gathered)
        return dx, sums

    def _finish(self, words: bytes, gathered: Tensor) -> int:
        """The rest of a pass, from the rows of all ranks; returns its status."""
        rows = (gathered.data_ptr(), len(gathered), gathered.stride(0))
        return self._library.syncbn_finish_pass(words, *rows)


def release_memory() -> int:
    """Give memory that is kept for results, and is not in use, back to the system; returns how many bytes.

    Only a process that has trained, goes on, and is short of memory needs it.
    """
    found = library()
    return 0 if found is None else found.syncbn_release_memory()


_ATEN = AtenBackend()


_fallback, _kernels = functools.cache(CpuFallback), functools.cache(CpuBackend)


def _kernels_serve(args: NormArgs) -> bool:
    """Whether the kernels serve a pass over these operands."""
    x, third = args.x, args.residual if args.output is None else args.output
    if args.mask is not None or not kernels_may_read(*args[:3], third) or not _has_kernels(x):
        return False
    if args.act == "silu" and x.dtype is torch.float64:
        return False
    return third is None or third.dtype is x.dtype


def _has_kernels(x: Tensor) -> bool:
    return x.dtype in _DTYPES and x.numel() > 0


def _geometry(x: Tensor) -> Geometry:
    return geometry_of(x.shape, x.stride(), x.dtype)


def _aligned(args: NormArgs, geometry: Geometry) -> NormArgs:
    """`args` as the library reads them; to be kept until it has returned."""
    x, weight, bias, residual = args[:4]
    x_aligned = _like(x, geometry)
    weight_aligned = _coefficients(weight, geometry.dtype)
    bias_aligned = _coefficients(bias, geometry.dtype)
    if residual is None and args.output is None:
        if x_aligned is x and weight_aligned is weight and bias_aligned is bias:
            return args
        return args._replace(x=x_aligned, weight=weight_aligned, bias=bias_aligned)
    residual = None if residual is None else _like(residual, geometry)
    output = None if args.output is None else _like(args.output, geometry)
    aligned = (x_aligned, weight_aligned, bias_aligned, residual)
    return NormArgs(*aligned, *args[4:10], output)


def _like(values: Tensor, geometry: Geometry) -> Tensor:
    """`values`, of the shape of x, in the order in which the library reads x."""
    if values.is_contiguous(memory_format=geometry.memory_format):
        return values
    return values.contiguous(memory_format=geometry.memory_format)


def _coefficients(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if values is None or (values.dtype is dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr() or _no_memory(values)


def _no_memory(values: Tensor) -> int:
    if not values.numel():
        return 0
    shape = tuple(values.shape)
    raise RuntimeError(f"a tensor of shape {shape} has no memory: its storage was resized")


def _addresses(stats: Stats) -> tuple[int, ...]:
    """As of `StatisticsBlock`."""
    if isinstance(stats, StatisticsBlock):
        return stats.addresses
    assert isinstance(stats, Statistics)
    total, mean, var, invstd = (values.data_ptr() for values in stats)
    return total, 0, mean, var, invstd


def _pass_words(
    kind: int, args: NormArgs, geometry: Geometry, dy: int, stats: tuple[int, ...], result: Tensor
) -> tuple[int, ...]:
    """The arguments of one pass, for `_PASS`; addresses are 0 for None."""
    total, _, mean, _, invstd = stats
    third = args.residual if args.output is None else args.output
    role = _NOTHING if third is None else _RESIDUAL if args.output is None else _OUTPUT
    act = 0 if args.act is None else ACTIVATIONS[args.act].code
    affine = (mean, invstd, _address(args.weight), _address(args.bias))
    operands = (_address(args.x), dy, _address(third), *affine, total, result.data_ptr())
    return kind, *geometry.words, torch.get_num_threads(), act, role, *operands


def _forward_words(
    args: NormArgs,
    geometry: Geometry,
    y: Tensor,
    block: StatisticsBlock,
    moved: Running | None,
    ring: int,
    number: int = 0,
) -> bytes:
    """A whole forward pass as the library takes it; `ring` is 0 alone."""
    _, own, _, var, _ = addresses = block.addresses
    words = _pass_words(_NORMALIZE, args, geometry, 0, addresses, y)
    running = _NO_RUNNING if moved is None else _running_words(moved)
    return _FUSED_PASS.pack(*words, own, ring, number, LOOK_NS, args.eps, var, *running)


def _backward_words(
    dy: Tensor,
    args: NormArgs,
    geometry: Geometry,
    stats: Stats,
    results: tuple[Tensor, Tensor | None],
    ring: int,
    number: int = 0,
) -> bytes:
    """A whole backward pass as the library takes it; `results` are dx and this rank's sums."""
    dx, sums = results
    words = _pass_words(_BACKWARD_INPUT, args, geometry, _address(dy), _addresses(stats), dx)
    exchange = (_address(sums), ring, number, LOOK_NS)
    return _FUSED_PASS.pack(*words, *exchange, 0.0, 0, *_NO_RUNNING)


def _settle(
    status: int,
    gathered: Tensor | None,
    args: NormArgs,
    block: StatisticsBlock,
    moved: Running | None,
) -> None:
    """Raise where there was nothing to normalise with; else see that running statistics have moved."""
    if status:
        packed = block.packed.unsqueeze(0) if gathered is None else gathered
        check_statistics(packed, block, args)
    if moved is not None:  # what autograd saved of them is stale
        mean, var, tracked, _ = moved
        increment_version((mean, var) if tracked is None else (mean, var, tracked))
    elif args.running is not None:
        update(args.running, block)


def _moved_by_library(running: Running | None) -> Running | None:
    """The running statistics that the library moves: `running`, unless they are of another kind than it writes."""
    if running is None or running.mean.dtype not in (torch.float32, torch.float64):
        return None
    return running if kernels_may_write(running) else None


def _running_words(running: Running) -> tuple[int, int, int, float, int]:
    """Running statistics as the library takes them; a momentum below 0 stands for the average over all batches."""
    mean, var, tracked, momentum = running
    weight = -1.0 if momentum is None else momentum
    is_double = mean.dtype == torch.float64
    return _address(mean), _address(var), _address(tracked), weight, is_double


def _empty(x: Tensor, geometry: Geometry) -> Tensor:
    """An uninitialised tensor of the shape and dtype of `x`, contiguous in the memory format of `geometry`.

    Large ones take memory that results of the last step no longer need; their storage cannot be resized.
    """
    if x.nbytes < SMALLEST_KEPT_BYTES or type(x) is not Tensor:
        return torch.empty_like(x, memory_format=geometry.memory_format)
    strides = x.stride()
    if not x.is_contiguous(memory_format=geometry.memory_format):
        strides = torch.empty_like(x, memory_format=geometry.memory_format, device="meta").stride()
    ndim = x.dim()
    layout = struct.pack(f"{2 * ndim}q", *x.shape, *strides)
    allocate, capsule = _allocator()
    managed = allocate(ndim, layout, _DTYPES[x.dtype], x.nbytes)
    if managed is None:
        return torch.empty_like(x, memory_format=geometry.memory_format)
    return from_dlpack(capsule(managed, b"dltensor", None))


@functools.cache
def _allocator() -> tuple[Callable[..., int | None], Callable[..., Any]]:
    """The library's function that makes a result, and Python's that makes a capsule of it."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule.restype = ctypes.py_object
    found = library()
    assert found is not None, "a backend has it"
    return found.syncbn_allocate, capsule
