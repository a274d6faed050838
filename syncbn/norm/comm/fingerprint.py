"""What a rank says of itself at the front of every frame, so that ranks which meet by mistake find out.

A header is compared as bytes and read only where it differs, so packing it is cached: between two calls of one
layer nothing but the call number changes, and that stands apart, in front.
"""

import bisect
import functools
import struct
from dataclasses import dataclass

import torch

CALL = struct.Struct("<q")
"""The number of the exchange, counted by each rank."""
BODY = struct.Struct("<6q136s")
"""kind, unnamed layer, channels, dtype, needs gradient, payload bytes; the layer's name, or what failed."""
HEADER_BYTES = CALL.size + BODY.size
TEXT_BYTES = 136
FORWARD, BACKWARD, FAILED = 1, 2, 3
NAMED = -1
Serial = int | tuple[int, ...]
"""When a layer was built, or several that meet together."""
_KINDS = {FORWARD: "forward", BACKWARD: "backward"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RanksDisagree(RuntimeError):
    """Ranks met in one exchange with different layers, shapes, dtypes or modes, one failed, or one did not come."""

    exit_code = 5


class RankLost(RuntimeError):
    """A rank that others wait for has ended; the same command may succeed when tried again."""

    exit_code = 75


@dataclass(frozen=True)
class Header:
    """What a rank is doing when it enters an exchange.

    Attributes:
        kind: FORWARD, BACKWARD or FAILED.
        unnamed: NAMED, or the layer's code in `Serials`.
        channels: C.
        dtype: of the layer's input; None for one that has no code of its own.
        needs_grad: whether a backward pass may follow.
        payload_bytes: what this rank sends.
        layer: its name, or what failed; the last 136 bytes of a longer name tell layers apart best.
    """

    kind: int
    unnamed: int
    channels: int
    dtype: torch.dtype | None
    needs_grad: bool
    payload_bytes: int
    layer: str

    def pack(self) -> bytes:
        """The header as `BODY`."""
        code = _DTYPES.index(self.dtype) if self.dtype in _DTYPES else -1
        words = (self.kind, self.unnamed, self.channels, code, self.needs_grad, self.payload_bytes)
        return BODY.pack(*words, self.layer.encode()[-TEXT_BYTES:])

    @staticmethod
    def unpack(body: bytes) -> "Header":
        """The header that `pack` made."""
        kind, unnamed, channels, code, needs_grad, size, layer = BODY.unpack(body)
        text = layer.rstrip(b"\0").decode(errors="replace")
        dtype = _DTYPES[code] if code >= 0 else None
        return Header(kind, unnamed, channels, dtype, bool(needs_grad), size, text)

    def place(self, call: int) -> str:
        """Where a rank is that sends this header as its exchange number `call`, in words."""
        if self.kind == FAILED:
            return f"failed in {self.layer}"
        mode = "" if self.needs_grad else ", no gradient"
        dtype = str(self.dtype or "another dtype").removeprefix("torch.")
        return (
            f"is in the {_KINDS[self.kind]} of SyncBatchNorm {self.layer!r} "
            f"(call {call}, {self.channels} channels, {dtype}{mode}{self._order()})"
        )

    def _order(self) -> str:
        """Which of the layers without a name this is."""
        if self.unnamed == NAMED:
            return ""
        used, built = divmod(self.unnamed, 2**32)
        return (
            f"; of the layers without a name, number {used + 1} to be used, {built + 1} by age then"
        )


@functools.lru_cache(maxsize=4096)
def packed(
    kind: int,
    unnamed: int,
    channels: int,
    dtype: torch.dtype,
    needs_grad: bool,
    payload_bytes: int,
    layer: str,
) -> bytes:
    """`Header(...).pack()`, remembered."""
    return Header(kind, unnamed, channels, dtype, needs_grad, payload_bytes, layer).pack()


def place_of(body: bytes, call: int) -> str:
    """What `body` says its rank is doing, in words."""
    return Header.unpack(body).place(call)


def disagreement(headers: list[bytes], own: int, ranks: list[int]) -> RanksDisagree:
    """The error for headers that differ: this rank's place and that of a rank elsewhere, a failed one first.

    Args:
        headers: call and body of every rank of the group, in order.
        own: this rank's place among them.
        ranks: their global ranks.
    """
    others = [rank for rank, header in enumerate(headers) if header != headers[own]]
    kinds = {rank: Header.unpack(headers[rank][CALL.size :]).kind for rank in others}
    other = next((rank for rank in others if kinds[rank] == FAILED), others[0])
    mine, theirs = (
        f"rank {ranks[rank]} {place_of(header[CALL.size :], CALL.unpack_from(header)[0])}"
        for rank, header in ((own, headers[own]), (other, headers[other]))
    )
    return RanksDisagree(
        f"{mine}; {theirs}: every rank must run the same layers in the same order and mode"
    )


def passed_by(rank: int, layer: str, waiting: str) -> RanksDisagree:
    """The error of a rank in the backward pass of `layer` in eval mode, while another rank is `waiting` for it."""
    return RanksDisagree(
        f"rank {rank} runs the backward pass of SyncBatchNorm {layer!r} in eval mode; "
        f"{waiting} and waits for it: every rank must run the same layers in the same order and mode"
    )


class Serials:
    """Codes that tell apart layers without a name, the same on every rank that builds and uses them in one order.

    A layer's serial number, its place in the order in which a process built its layers, means nothing to other
    processes: they may have built more. What must agree is when each layer was first used here, and how many
    of those used before it are older than it.
    """

    def __init__(self) -> None:
        self._codes: dict[Serial, int] = {NAMED: NAMED}
        self._used: list[int] = []

    def code(self, serial: Serial) -> int:
        """The code of the layer built as number `serial`, if it is not used before it is kept; NAMED stays."""
        code = self._codes.get(serial)
        if code is None:
            code = len(self._used) << 32 | bisect.bisect(self._used, _first(serial))
        return code

    def keep(self, serial: Serial) -> None:
        """Count the layer as used: all ranks have met in it, so that one that failed before is not behind."""
        if serial not in self._codes:
            self._codes[serial] = self.code(serial)
            bisect.insort(self._used, _first(serial))


def _first(serial: Serial) -> int:
    return serial if isinstance(serial, int) else serial[0]
