"""The random state of one rank, as one row of bytes.

A row has the same length on every rank with the same kind of device, so that ranks can gather theirs with a single
sum over a (world_size, n) matrix of zeros and need neither pickle nor a second exchange of lengths.
"""

import base64
import random
import struct

import numpy as np
import torch
from torch import Tensor

_PYTHON = struct.Struct("<625I?d")
_NUMPY = struct.Struct("<624Ii?d")


def capture(device: torch.device) -> Tensor:
    """The state of Python's, numpy's global and torch's generators (`device`'s too): (n,) uint8 on the CPU."""
    _, words, gauss = random.getstate()
    python = _PYTHON.pack(*words, gauss is not None, gauss or 0.0)
    _, key, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - saved because others use it
    numpy = _NUMPY.pack(*map(int, key), int(position), bool(has_gauss), float(cached))
    parts = [torch.frombuffer(bytearray(python + numpy), dtype=torch.uint8), torch.get_rng_state()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    return torch.cat(parts)


def restore(row: Tensor, device: torch.device) -> None:
    """Set every generator that `capture` saw back to the state in `row`."""
    numpy_at, torch_at = _PYTHON.size, _PYTHON.size + _NUMPY.size
    cuda_at = torch_at + torch.get_rng_state().numel()
    *words, has_gauss, gauss = _PYTHON.unpack(bytes(row[:numpy_at].tolist()))
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *key, position, has_cached, cached = _NUMPY.unpack(bytes(row[numpy_at:torch_at].tolist()))
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(has_cached), cached))  # noqa: NPY002
    torch.set_rng_state(row[torch_at:cuda_at].clone())
    if device.type == "cuda" and row.numel() > cuda_at:
        torch.cuda.set_rng_state(row[cuda_at:].clone(), device)


def to_text(row: Tensor) -> str:
    """`row` as base64, for a JSON file."""
    return base64.b64encode(row.numpy().tobytes()).decode()


def from_text(text: str) -> Tensor:
    """The row that `to_text` wrote."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
