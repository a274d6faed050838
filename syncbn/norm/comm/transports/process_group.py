"""Frames through the process group: the transport that always works.

On gloo the first frame has the same size whatever the layer: gloo aborts the process when sizes differ, and returns
garbage when only dtypes do. The header in it is compared before a value is used; what does not fit follows in
one further frame, whose size all ranks have then agreed on. Once an exchange has failed, the transport stays failed,
because ranks are then out of step.
"""

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.norm.comm.fingerprint import HEADER_BYTES, NUMBER, RankLost, RanksDisagree, disagreement
from syncbn.norm.comm.groups import Members
from syncbn.norm.comm.watchdog import Wait, give_up

PAYLOAD_BYTES = 4 * (2 * 2048 + 2)
"""Count, mean and M2 of 2048 channels in float32: every layer of a ResNet-50 fits one frame."""

GATHER_BYTES = 2**20
"""What a rank of a CPU group may receive in one gather: beyond it a reduction moves less."""
GATHER_RANKS = 16
"""Ranks of a CUDA group that gather; from more on a reduction has fewer steps (NCCL's cost model, unmeasured)."""
_LOOK = timedelta(seconds=1)
"""How long to wait before looking why the others do not come."""
_LATE = re.compile("timed out|timeout", re.IGNORECASE)
_LOST = re.compile("connection (closed|reset)|broken pipe|socket closed", re.IGNORECASE)
"""What gloo says of a rank that did not come in time, and of one that closed its connection."""


class Group(Members):
    """The collectives of one process group; as a `Transport`, one gather an exchange."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)
        self._failure = ""

    def all_gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`; of one size and dtype on all ranks; itself where there is one."""
        ranks, size = self.world_size, values.numel()
        gathered = values if ranks == 1 else values.new_empty(ranks * size)
        self._run(dist.all_gather_into_tensor, gathered, values)
        return gathered.view(ranks, size)

    def all_tell(self, own: bytes) -> list[bytes]:
        """What every rank tells, each as many bytes as `own`."""
        gathered = self.all_gather(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        return [bytes(row) for row in gathered.tolist()]

    def all_agree(self, holds: bool) -> bool:
        """Whether something holds on every rank."""
        return b"\0" not in self.all_tell(bytes([holds]))

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, in place, the same bits on each."""
        self._run(dist.all_reduce, values)
        return values

    def exchange(self, header: bytes, number: int, payload: Tensor) -> Tensor:
        """See `Transport`; raises RuntimeError where gloo fails for another reason than a rank that is lost or late."""
        self.turn = header, number
        front = NUMBER.pack(number) + header
        own, length = bytes_of(payload), frame_bytes(self.world_size)
        room = length - HEADER_BYTES
        frame = torch.zeros(length, dtype=torch.uint8, device="cpu")
        bytes_of(frame)[: HEADER_BYTES + len(own[:room])] = front + own[:room]
        frames = self.all_gather(frame)
        told = bytes_of(frames)
        headers = [bytes(told[at : at + HEADER_BYTES]) for at in range(0, len(told), length)]
        if any(theirs != front for theirs in headers):
            raise disagreement(headers, self.rank, self.ranks)
        parts = [frames[:, HEADER_BYTES:][:, : len(own)]]
        if len(own) > room:
            parts.append(self.all_gather(payload.view(torch.uint8)[room:]))
        return torch.cat(parts, dim=1).view(payload.dtype)

    def _run(self, collective: Callable[..., dist.Work | None], *values: Tensor) -> None:
        """Run a collective to its end; once one has failed, ranks are out of step."""
        first = values[0]
        if first.is_cuda:  # nothing waits on the host, and torch tells what failed
            collective(*values, group=self.process_group)
            return
        if self._failure:
            raise RanksDisagree(self._failure)
        try:
            try:
                work = collective(*values, group=self.process_group, async_op=True)
            except RuntimeError as error:
                raise RuntimeError(f"{self.here()}: the exchange failed: {error}") from error
            assert work is not None, "this rank is in the group"
            self._finish(work)
        except BaseException as error:
            self._failure = give_up(self, error)
            raise

    def _finish(self, work: dist.Work) -> None:
        """Wait for a collective of CPU tensors, and look after ranks that do not come to it."""
        with suppress(RuntimeError):  # it is raised again below
            if _is_done(work):
                return
        with Wait(self) as wait:
            try:
                while not _is_done(work):
                    wait.look()
            except (RanksDisagree, RankLost):
                raise
            except RuntimeError as error:
                raise _explained(error, wait) from error


def _is_done(work: dist.Work) -> bool:
    """Wait a little for `work`; raises its error where it failed."""
    try:
        work.wait(_LOOK)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


def _explained(error: RuntimeError, wait: Wait) -> RuntimeError:
    """What gloo's `error` means for the layer that waits."""
    text = str(error)
    if _LATE.search(text):
        return wait.timed_out()
    if _LOST.search(text):
        return wait.lost(text)
    return RuntimeError(f"{wait.here}: the exchange failed: {text or type(error).__name__}")


def frame_bytes(world_size: int) -> int:
    """Size of the first frame: the same for every layer, and no more than may be gathered."""
    return max(HEADER_BYTES, min(HEADER_BYTES + PAYLOAD_BYTES, GATHER_BYTES // world_size // 8 * 8))


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor, which must outlive the view."""
    if not values.numel():
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B")
