"""Frames through the process group: the way that always works.

On gloo the first frame has the same size whatever the layer: gloo aborts the process when sizes differ, and returns
garbage when only dtypes do. The header in it is compared before a value is used; what does not fit follows in
one further frame, whose size all ranks have then agreed on. How long it waits for a rank that does not come is the
group's time limit; once it has failed, it stays failed, because ranks are then out of step.
"""

import ctypes
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.norm.comm.fingerprint import CALL, HEADER_BYTES, RanksDisagree, disagreement, place_of

PAYLOAD_BYTES = 4 * (2 * 2048 + 2)
"""Count, mean and M2 of 2048 channels in float32: every layer of a ResNet-50 fits one frame."""

GATHER_BYTES = 2**20
"""What a rank of a CPU group may receive in one gather: beyond it a reduction moves less."""
GATHER_RANKS = 16
"""Ranks of a CUDA group that gather; from more on a reduction has fewer steps (NCCL's cost model, unmeasured)."""


class Transport(Protocol):
    """What brings every rank's values to every rank: one exchange at a time, in two halves."""

    def begin(self, header: bytes, call: int, payload: Tensor) -> Callable[[], Tensor]:
        """Send `payload` `(k,)` behind its header, without waiting for other ranks, as far as that goes.

        Returns:
            What waits for every rank's payload, `(W, k)` in rank order, after comparing headers and call numbers. It is
            called before the next exchange begins.

        Raises:
            RanksDisagree: on every rank where they differ; or where a rank does not come.
            RankLost: a rank has ended.
        """
        ...

    def pass_by(self, layer: str, backward: bool) -> None:
        """Note that this rank went through `layer` in eval mode, without an exchange."""
        ...


class Wire:
    """Collectives of one process group; as a `Transport`, one gather an exchange.

    The group is held weakly: a group that outlives `destroy_process_group` takes the process down at its exit.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_process_group_ranks(group)
        self._failure = ""

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def group(self) -> ProcessGroup:
        """The group itself."""
        group = self._group()
        assert group is not None, "the group was destroyed"
        return group

    @property
    def timeout_s(self) -> float:
        """The longest wait that the group allows on the CPU, in seconds."""
        return self.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    def all_gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`; of one size and dtype on all ranks; itself where there is one."""
        return self.begin_gather(values, overlap=False)()

    def begin_gather(self, values: Tensor, overlap: bool) -> Callable[[], Tensor]:
        """What waits for `all_gather`; with `overlap` the caller, or on CUDA its stream, goes on meanwhile."""
        ranks, size = self.world_size, values.numel()
        gathered = values if ranks == 1 else values.new_empty(ranks * size)
        work = dist.all_gather_into_tensor(gathered, values, group=self.group, async_op=overlap)
        return lambda: _waited(work, gathered).view(ranks, size)

    def begin_reduction(self, values: Tensor, overlap: bool) -> Callable[[], Tensor]:
        """What waits for the sum of every rank's `values`, in place, the same bits on each; `overlap` as above."""
        work = dist.all_reduce(values, group=self.group, async_op=overlap)
        return lambda: _waited(work, values)

    def begin(self, header: bytes, call: int, payload: Tensor) -> Callable[[], Tensor]:
        """See `Transport`; raises the group's own error where a rank is lost or late, RanksDisagree from then on."""
        if self._failure:
            raise RanksDisagree(self._failure)
        front = CALL.pack(call) + header
        try:
            frames = self.begin_gather(self._frame(front, payload), overlap=True)
        except BaseException as error:
            self._fail(error, front)
            raise
        return partial(self._rest, front, payload, frames)

    def _frame(self, header: bytes, payload: Tensor) -> Tensor:
        own, length = bytes_of(payload), frame_bytes(self.world_size)
        room = length - HEADER_BYTES
        frame = torch.zeros(length, dtype=torch.uint8, device="cpu")
        bytes_of(frame)[: HEADER_BYTES + len(own[:room])] = header + own[:room]
        return frame

    def _rest(self, header: bytes, payload: Tensor, first: Callable[[], Tensor]) -> Tensor:
        try:
            return self._gathered(header, payload, first())
        except RanksDisagree:
            raise
        except BaseException as error:
            self._fail(error, header)
            raise

    def _fail(self, error: BaseException, header: bytes) -> None:
        """Whatever went wrong, ranks are out of step from here on."""
        place = place_of(header[CALL.size :], CALL.unpack_from(header)[0])
        here = f"rank {self.ranks[self.rank]} {place}"
        self._failure = f"{here}: the exchange failed: {error or type(error).__name__}"

    def _gathered(self, header: bytes, payload: Tensor, frames: Tensor) -> Tensor:
        own, length = bytes_of(payload), frame_bytes(self.world_size)
        room = length - HEADER_BYTES
        told = bytes_of(frames)
        headers = [bytes(told[at : at + HEADER_BYTES]) for at in range(0, len(told), length)]
        if any(theirs != header for theirs in headers):
            raise disagreement(headers, self.rank, self.ranks)
        parts = [frames[:, HEADER_BYTES:][:, : len(own)]]
        if len(own) > room:
            parts.append(self.all_gather(payload.view(torch.uint8)[room:]))
        return torch.cat(parts, dim=1).view(payload.dtype)

    def pass_by(self, layer: str, backward: bool) -> None:
        """Nothing: a rank that does not come is noticed at the group's time limit."""


def _waited(work: dist.Work | None, values: Tensor) -> Tensor:
    """`values`, once they are there."""
    if work is not None:
        work.wait()
    return values


def frame_bytes(world_size: int) -> int:
    """Size of the first frame: the same for every layer, and no more than may be gathered."""
    return max(HEADER_BYTES, min(HEADER_BYTES + PAYLOAD_BYTES, GATHER_BYTES // world_size // 8 * 8))


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor, which must outlive the view."""
    if not values.numel():
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B")
