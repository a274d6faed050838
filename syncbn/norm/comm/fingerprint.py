"""The header of a collective: what each rank is doing, in front of what it sends, so that a mismatch is an error.

A header is compared as bytes and read only where it differs, so packing it is cached: between two exchanges of one
layer nothing but the sequence number changes, and that stands apart, in front.
"""

import bisect
import functools
import struct
from typing import NamedTuple

import torch

NUMBER = struct.Struct("<q")
"""The sequence number of the exchange, counted by each rank."""
BODY = struct.Struct("<6q136s")
"""The fields of `Header`."""
HEADER_BYTES = NUMBER.size + BODY.size
TEXT_BYTES = 136
FORWARD, BACKWARD, FAILED = 1, 2, 3
NAMED = -1
"""The serial number of a layer with a name."""
RULE = "every rank must run the same layers in the same order and mode"
_KINDS = {FORWARD: "forward", BACKWARD: "backward"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Fingerprint(NamedTuple):
    """What all ranks of one exchange must agree on, beside its direction and sequence number.

    Attributes:
        layer: its name, or a text for one without a name.
        num_channels: C.
        dtype: of the layer's input.
        needs_grad: whether a backward pass may follow.
        serial: of a layer without a name, its place in the order in which this process built layers.
    """

    layer: str
    num_channels: int
    dtype: torch.dtype
    needs_grad: bool
    serial: int = NAMED


class RanksDisagree(RuntimeError):
    """Ranks exchange different layers, shapes, dtypes or modes, one failed, or one did not take part."""

    exit_code = 5


class RankLost(RuntimeError):
    """A rank that others wait for exited; the same command may succeed when tried again."""

    exit_code = 75


class Header(NamedTuple):
    """What a rank is doing when it enters an exchange, as it travels.

    Attributes:
        kind: FORWARD, BACKWARD or FAILED.
        code: NAMED, or the layer's code in `Serials`.
        num_channels: C.
        dtype: of the layer's input, by its place in `_DTYPES`; -1 for any other.
        needs_grad: whether a backward pass may follow.
        payload_bytes: what this rank sends.
        layer: its name, of which the last 136 bytes tell layers apart best; or the first 136 of what failed.
    """

    kind: int
    code: int
    num_channels: int
    dtype: int
    needs_grad: bool
    payload_bytes: int
    layer: bytes


@functools.lru_cache(maxsize=4096)
def packed(kind: int, code: int, payload_bytes: int, what: Fingerprint) -> bytes:
    """The `Header` of an exchange of `what` as `BODY`."""
    dtype = _DTYPES.index(what.dtype) if what.dtype in _DTYPES else -1
    text = what.layer.encode()
    layer = text[:TEXT_BYTES] if kind == FAILED else text[-TEXT_BYTES:]
    return BODY.pack(kind, code, what.num_channels, dtype, what.needs_grad, payload_bytes, layer)


def unpacked(body: bytes) -> Header:
    """The header that `packed` made."""
    return Header._make(BODY.unpack(body))


def text_of(body: bytes, number: int) -> str:
    """What a rank that sends `body` as its exchange `number` is doing, in words."""
    header = unpacked(body)
    layer = header.layer.rstrip(b"\0").decode(errors="ignore")
    if header.kind == FAILED:
        return f"failed in {layer}"
    dtype = str(_DTYPES[header.dtype]) if header.dtype >= 0 else "another dtype"
    mode = "" if header.needs_grad else ", no gradient"
    order = ""
    if header.code != NAMED:
        used, built = divmod(header.code, 2**32)
        order = (
            f"; of the layers without a name, number {used + 1} to be used, {built + 1} by age then"
        )
    return (
        f"is in the {_KINDS[header.kind]} of SyncBatchNorm {layer!r} (sequence number {number}, "
        f"{header.num_channels} channels, {dtype.removeprefix('torch.')}{mode}{order})"
    )


def disagreement(headers: list[bytes], own: int, ranks: list[int]) -> RanksDisagree:
    """The error for headers that differ: what this rank and a rank that differs are doing, a failed one first.

    Args:
        headers: sequence number and body of every rank of the group, in order.
        own: the index of this rank among them.
        ranks: their global ranks.
    """
    others = [rank for rank, header in enumerate(headers) if header != headers[own]]
    kinds = {rank: unpacked(headers[rank][NUMBER.size :]).kind for rank in others}
    other = next((rank for rank in others if kinds[rank] == FAILED), others[0])
    mine, theirs = (
        f"rank {ranks[rank]} {text_of(header[NUMBER.size :], NUMBER.unpack_from(header)[0])}"
        for rank, header in ((own, headers[own]), (other, headers[other]))
    )
    return RanksDisagree(f"{mine}; {theirs}: {RULE}")


class Serials:
    """Codes that tell apart layers without a name, the same on every rank that builds and uses them in one order.

    A layer's serial number, its place in the order in which a process built its layers, means nothing to other
    processes: they may have built more. What must agree is when each layer was first used here, and how many
    of those used before it are older than it.
    """

    def __init__(self) -> None:
        self.codes: dict[int, int] = {NAMED: NAMED}
        """By serial number, of layers that were used."""
        self._used: list[int] = []

    def code(self, serial: int) -> int:
        """The code of the layer built as number `serial`, if it is not used before it is kept; NAMED stays."""
        used = self.codes.get(serial)
        return len(self._used) << 32 | bisect.bisect(self._used, serial) if used is None else used

    def keep(self, serial: int) -> None:
        """Count the layer as used: its exchange took place on all ranks, so a rank that failed before is not behind."""
        if serial not in self.codes:
            self.codes[serial] = self.code(serial)
            bisect.insort(self._used, serial)
