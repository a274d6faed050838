"""What crosses the wire: one collective forward, one backward, each carrying its own header.

This is the only file that talks to a process group. Decisions:

* **One gather each way.** Every rank gets every rank's values and combines them in rank order, so all ranks
  compute the same bits, and on gloo a gather is faster than a reduction (290 us against 560 us, 2 ranks).
* **Every frame on a CPU group has the same size**, whatever the layer: gloo aborts the process when sizes
  differ, and returns garbage when only dtypes do. A header inside the frame is compared before a value is used;
  what does not fit the first frame follows in a second one, whose size all ranks have then agreed on.
* **A rank that cannot take part says so in its frame**, so that the others raise instead of waiting.
* On CUDA the values alone are gathered, at their exact size: comparing headers on the host would stall it.
"""

import struct
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

HEADER = struct.Struct("<6q80s")
"""kind, call number, channels, dtype, needs gradient, payload bytes; the layer's name, or what failed."""
PAYLOAD_BYTES = 4 * (2 * 2048 + 2)
"""Count, mean and M2 of 2048 channels in float32: every layer of a ResNet-50 fits one frame."""

FORWARD, BACKWARD, FAILED = 1, 2, 3
_KINDS = {FORWARD: "forward", BACKWARD: "backward"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RanksDisagree(RuntimeError):
    """Ranks met in one exchange with different layers, shapes, dtypes or modes, or one of them failed."""

    exit_code = 5


@dataclass(frozen=True)
class Header:
    """What a rank is doing when it enters an exchange."""

    kind: int
    call: int
    channels: int
    dtype: torch.dtype
    needs_grad: bool
    payload_bytes: int
    layer: str

    def pack(self) -> bytes:
        """The header as bytes; the last 80 bytes of a longer layer name tell layers apart best."""
        code = _DTYPES.index(self.dtype) if self.dtype in _DTYPES else -1
        words = (self.kind, self.call, self.channels, code, self.needs_grad, self.payload_bytes)
        return HEADER.pack(*words, self.layer.encode()[-80:])

    @staticmethod
    def unpack(data: bytes) -> "Header":
        """The header that `pack` made."""
        kind, call, channels, code, needs_grad, size, layer = HEADER.unpack(data)
        text = layer.rstrip(b"\0").decode(errors="replace")
        return Header(kind, call, channels, _DTYPES[code], bool(needs_grad), size, text)

    def __str__(self) -> str:
        """The header in words, for error messages."""
        if self.kind == FAILED:
            return f"failed in {self.layer}"
        mode = "" if self.needs_grad else ", no gradient"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"is in the {_KINDS[self.kind]} of SyncBatchNorm {self.layer!r} "
            f"(call {self.call}, {self.channels} channels, {dtype}{mode})"
        )


class Exchange:
    """The exchanges of one process group, numbered in the order in which this rank enters them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._calls = 0

    def gather(
        self,
        values: Tensor,
        *,
        kind: int,
        layer: str,
        channels: int,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`, after comparing what the ranks are doing.

        Raises:
            RanksDisagree: on every rank, when any two ranks' headers differ.
        """
        self._calls += 1
        if values.is_cuda:
            return self._all_gather(values)
        payload = values.contiguous().view(torch.uint8)
        header = Header(kind, self._calls, channels, dtype, needs_grad, payload.numel(), layer)
        return self._gather_frames(header, payload).view(values.dtype)

    def fail(self, message: str) -> None:
        """Tell the ranks that wait in the next exchange, on a CPU group, that this one cannot take part."""
        self._calls += 1
        header = Header(FAILED, self._calls, 0, torch.float32, False, 0, message[:80])
        with suppress(RanksDisagree):  # the caller is about to raise its own, better message
            self._gather_frames(header, torch.empty(0, dtype=torch.uint8))

    def _gather_frames(self, header: Header, payload: Tensor) -> Tensor:
        """Payloads of all ranks, `(W, bytes)`."""
        frame = torch.zeros(HEADER.size + PAYLOAD_BYTES, dtype=torch.uint8)
        frame[: HEADER.size] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        first, rest = payload[:PAYLOAD_BYTES], payload[PAYLOAD_BYTES:]
        frame[HEADER.size : HEADER.size + first.numel()] = first
        frames = self._all_gather(frame)
        headers = frames[:, : HEADER.size]
        if not torch.equal(headers, headers[:1].expand_as(headers)):
            self._raise_difference([Header.unpack(bytes(h.tolist())) for h in headers])
        parts = [frames[:, HEADER.size : HEADER.size + first.numel()]]
        if rest.numel() > 0:
            parts.append(self._all_gather(rest))
        return torch.cat(parts, dim=1)

    def _all_gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` `(k,)` as `(W, k)`, in one collective."""
        gathered = values.new_empty(self.world_size * values.numel())
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=self.group)
        return gathered.view(self.world_size, -1)

    def _raise_difference(self, headers: list[Header]) -> None:
        """Name this rank's place and that of a rank elsewhere, one that failed before all others."""
        mine = headers[self.rank]
        others = [r for r, h in enumerate(headers) if h != mine]
        other = next((r for r in others if headers[r].kind == FAILED), others[0])
        raise RanksDisagree(
            f"rank {self._global(self.rank)} {mine}; rank {self._global(other)} {headers[other]}: "
            "every rank must run the same layers in the same order and mode"
        )

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


_exchanges: dict[ProcessGroup, Exchange] = {}


def exchange_of(group: ProcessGroup) -> Exchange:
    """The one `Exchange` of `group` in this process."""
    if group not in _exchanges:
        for stale in [g for g in _exchanges if not _registered(g)]:
            del _exchanges[stale]
        _exchanges[group] = Exchange(group)
    return _exchanges[group]


def _registered(group: ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, RuntimeError):
        return False
    return True
