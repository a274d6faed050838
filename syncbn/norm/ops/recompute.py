"""Activation checkpointing: which forward pass is a replay, and of which earlier pass.

Checkpointing runs part of a network a second time while the backward pass runs. A pass of the layer in such a replay
normalises with the statistics of the pass that it repeats; it exchanges nothing and updates nothing. That pass is
identified, never guessed from values: it is the n-th pass in its checkpointed region, and the replay of that region
counts its own passes.

* A region of `torch.utils.checkpoint(..., use_reentrant=False)` is a `_CheckpointFrame`. The region's hooks on saved
  tensors hold it: strongly while the region runs for the first time, by a weak reference while it is recomputed.
* A region of a reentrant checkpoint (torch's own, Megatron's, DeepSpeed's, fairscale's) is the `ctx` of an autograd
  Function that runs the network in its `forward`, and again in its `backward`. The Python stack shows it.
* Regions may lie in each other. A first pass is recorded in all that surround it; a replayed pass is recorded in
  those inside the replay that run for the first time, because they may be replayed in turn.

Records are attributes of the frame or the `ctx`, so they live as long as the region's graph. A pass that no region
surrounds is an ordinary one, also while a backward pass runs.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import isfunction, unwrap
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _autograd, _current_graph_task_id, _is_fwd_grad_enabled
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _CheckpointFrame, _StopRecomputationError

from syncbn.norm.moments import Stats

_RECORDS, _REPLAY = "_syncbn_records", "_syncbn_replay"
"""Attributes of a region: what its first run recorded; of what replays it: how far it is."""

_BACKWARD = tuple(f.__code__ for f in vars(BackwardCFunction).values() if isfunction(f))
_NAMES = {"forward", *(code.co_name for code in _BACKWARD)}
_ENGINE = graph._engine_run_backward.__code__
_CHECKPOINT = checkpoint.__file__
_KEYS = torch._C._TorchDispatchModeKey
_COMPUTING = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)
_CALL_MODULE = nn.Module._call_impl.__code__


class Pass:
    """A forward pass of a layer in a checkpointed region.

    Args:
        repeated: the pass that this one repeats; None the first time.
        records: of the regions around it that run for the first time.
    """

    __slots__ = ("_records", "_repeated", "_statistics", "replaying")

    def __init__(self, repeated: "Pass | None", records: "list[list[Pass]]") -> None:
        self._statistics: Stats | None = None
        self._repeated, self._records = repeated, records
        self.replaying = repeated is not None
        if repeated is not None:
            self._add(repeated)

    def known(self, channels: int) -> Stats | None:
        """The statistics of the pass that this one repeats; None the first time.

        Raises:
            RuntimeError: that pass was of another layer.
        """
        if self._repeated is None:
            return None
        statistics = self._repeated._statistics
        if statistics is None or len(statistics.mean) != channels:
            raise RuntimeError(
                "activation checkpointing replays a region whose synchronised layers ran in another order the first "
                "time: the region must do the same both times"
            )
        return statistics

    def record(self, statistics: Stats | None) -> None:
        """Keep a first pass's statistics, None of torch's own operation; every first pass calls this once."""
        self._statistics = statistics
        self._add(self)

    def _add(self, one: "Pass") -> None:
        for records in self._records:
            records.append(one)
        self._records = []  # the graph of a pass keeps no other pass's statistics


def current() -> Pass | None:
    """The pass that begins here; None where no checkpointed region surrounds it. To be called once a pass.

    It costs 0.2 us where nothing is checkpointed: then there are no hooks on saved tensors, no autograd Function is in
    its `forward` (which alone disables forward-mode derivatives), and no backward pass runs.

    Raises:
        RuntimeError: a replay runs more passes than the first time, or this version of torch keeps its regions in
            another way.
    """
    in_function = not _is_fwd_grad_enabled() or _current_graph_task_id() != -1
    if not in_function and _autograd._top_saved_tensors_default_hooks(True) is None:
        return None
    first, repeated = _in_functions(sys._getframe(1)) if in_function else ([], None)
    for pack in _pack_hooks():
        region, recomputed = _region_of(pack)
        if recomputed:
            # a backward pass that runs inside the region is replayed with it: both name the same pass
            repeated = _next(region, pack, None)
            break
        if region is not None:
            first.append(region)
    if repeated is None and not first:
        return None
    return Pass(repeated, [_records(region) for region in first])


def _records(region: Any) -> list[Pass]:
    return vars(region).setdefault(_RECORDS, [])


def _next(region: Any, replay: Any, run: int | None) -> Pass:
    """The pass of `region` whose turn it is in a replay.

    Args:
        region: that is replayed.
        replay: carries the position, and is used for one replay at a time.
        run: tells one replay from the next; None where each has a `replay` of its own.
    """
    records, (last, position) = _records(region), getattr(replay, _REPLAY, (run, 0))
    position = position if last == run else 0
    if position >= len(records):
        if not getattr(region, "forward_completed", True):
            # a backward pass inside a region replays as much of it as has run, and needs no more
            raise _StopRecomputationError
        raise RuntimeError(
            f"activation checkpointing replays pass {position + 1} of a synchronised layer in a region that ran "
            f"{len(records)} the first time: the region must do the same both times, in the same mode "
            "(train or eval)"
        )
    setattr(replay, _REPLAY, (run, position + 1))
    return records[position]


def _pack_hooks() -> list[Any]:
    """The pack hooks on saved tensors, innermost first."""
    top, hooks = _autograd._top_saved_tensors_default_hooks, []
    if _autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return hooks if (pair := top(True)) is None else [pair[0]]
    try:
        while (pair := top(True)) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            hooks.append(pair)
    finally:
        for pair in reversed(hooks):
            _autograd._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in hooks]


def _region_of(pack: Any) -> tuple[_CheckpointFrame | None, bool]:
    """The region that a pack hook belongs to, and whether the hook recomputes it."""
    function = unwrap(pack)
    for cell in getattr(function, "__closure__", None) or ():
        value = cell.cell_contents
        if isinstance(value, _CheckpointFrame):
            return value, False
        if isinstance(value, weakref.ref) and isinstance(region := value(), _CheckpointFrame):
            return region, True
    if getattr(function, "__module__", None) == checkpoint.__name__:
        raise RuntimeError(
            f"SyncBatchNorm cannot tell which region torch.utils.checkpoint runs in torch {torch.__version__}: its "
            "hooks have changed; use_reentrant=True works"
        )
    return None, False


def _in_functions(frame: FrameType | None) -> tuple[list[Any], Pass | None]:
    """The regions of autograd Functions around `frame`: those that run for the first time, and the pass replayed.

    The search ends at the first replay, and where a backward pass was started: what lies beyond does not call `frame`
    as part of itself.
    """
    first: list[Any] = []
    while frame is not None and (code := frame.f_code) is not _ENGINE:
        if code.co_filename == _CHECKPOINT and _recomputes(frame):
            break
        region = _ctx(frame) if code.co_name in _NAMES else None
        if code.co_name == "forward" and region is not None:
            # a forward may call the one of its base class
            first += [] if any(region is known for known in first) else [region]
        elif hasattr(region, _RECORDS):
            return first, _next(region, region, _current_graph_task_id())
        frame = frame.f_back
    return first, None


def _recomputes(frame: FrameType) -> bool:
    """Whether `frame`, of torch.utils.checkpoint, is the hook that runs a region again."""
    names = frame.f_code.co_freevars
    return any(isinstance(frame.f_locals.get(name), _CheckpointFrame) for name in names)


def _ctx(frame: FrameType) -> Any:
    """The `ctx` of the autograd Function whose forward or backward `frame` runs; None where it runs none.

    Other frames are not read: that would keep their local variables, and so activations, until they end. A Function in
    which a compiler runs its graphs is no checkpoint, because its backward runs a part of them, in another order.
    """
    code, caller = frame.f_code, frame.f_back
    in_module = caller is not None and caller.f_code is _CALL_MODULE
    in_forward = code.co_name == "forward" and code.co_argcount > 0 and not in_module
    if not in_forward and not any(code is known for known in _BACKWARD):
        return None
    ctx = frame.f_locals.get(code.co_varnames[0])
    return ctx if isinstance(ctx, BackwardCFunction) and not _of_compiler(ctx) else None


def _of_compiler(ctx: Any) -> bool:
    return ctx._forward_cls.__module__.startswith("torch._")


@contextmanager
def unchanged(*buffers: Tensor | None) -> Iterator[None]:
    """Restore the values of `buffers` at the end, unseen by dispatch modes and version counters."""
    present = [buffer for buffer in buffers if buffer is not None]
    with unobserved():
        before = [buffer.detach().clone() for buffer in present]
    try:
        yield
    finally:  # also where checkpointing ends a replay early, by an exception
        with unobserved():
            for buffer, values in zip(present, before, strict=True):
                buffer.data.copy_(values)


def unobserved() -> AbstractContextManager[Any]:
    """Run operations that selective checkpointing neither counts nor caches.

    Its cache is a list of operations, and the first run and the replay of a pass execute different ones. Modes that
    compute in another way (fake tensors, tracing) stay.
    """
    computing = any(torch._C._get_dispatch_mode(key) is not None for key in _COMPUTING)
    if computing or not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    return _disable_current_modes()
