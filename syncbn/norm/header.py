"""What a rank says of itself at the front of every frame, so that ranks which meet by mistake find out."""

import struct
from dataclasses import dataclass

import torch

HEADER = struct.Struct("<6q80s")
"""kind, call number, channels, dtype, needs gradient, payload bytes; the layer's name, or what failed."""
FORWARD, BACKWARD, FAILED = 1, 2, 3
_KINDS = {FORWARD: "forward", BACKWARD: "backward"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Header:
    """What a rank is doing when it enters an exchange."""

    kind: int
    call: int
    channels: int
    dtype: torch.dtype | None
    """None for one that has no code of its own."""
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
        return Header(
            kind, call, channels, _DTYPES[code] if code >= 0 else None, bool(needs_grad), size, text
        )

    def __str__(self) -> str:
        """The header in words, for error messages."""
        if self.kind == FAILED:
            return f"failed in {self.layer}"
        mode = "" if self.needs_grad else ", no gradient"
        dtype = str(self.dtype or "another dtype").removeprefix("torch.")
        return (
            f"is in the {_KINDS[self.kind]} of SyncBatchNorm {self.layer!r} "
            f"(call {self.call}, {self.channels} channels, {dtype}{mode})"
        )
