"""The bytes of a checkpoint: four files, and the proof that they are those that were written.

Integrity is checked on bytes, before any parser. `torch.load` accepts a flipped bit, so the files are read once,
compared with the manifest, and only those very bytes are parsed, by parsers that run no code: safetensors for the
model, `weights_only=True` for the rest, JSON.
"""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from syncbn.checkpoint import safetensors_file
from syncbn.errors import CheckpointError

MODEL, STATE, META, MANIFEST = "model.safetensors", "state.pt", "meta.json", "manifest.json"
_FILES = (MODEL, STATE, META)
_PLAIN = (Tensor, nn.Parameter, str, int, float, bool, type(None))
T = TypeVar("T")
Blob = bytes | memoryview
"""The bytes of a file."""


@dataclass(frozen=True)
class Meta:
    """Where a run stood when it was saved."""

    step: int
    """Optimiser steps done."""
    position: int
    """Samples drawn so far, over all ranks."""
    config_hash: str
    """Hash of what decides the run's numbers."""
    world_size: int
    """Ranks that trained."""
    global_batch: int
    """Samples a step, over all ranks."""
    rng: list[str] = field(default_factory=list)
    """Random state of each rank (`rng.to_text`), in rank order."""
    parallel: str = "ddp"
    """How the network was spread over ranks; whole in the checkpoint."""


def encode(
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    extra: Mapping[str, Any],
    meta: Meta,
) -> dict[str, Blob]:
    """The files of a checkpoint by name.

    Raises:
        CheckpointError: the optimiser's state or `extra` holds something that reading would refuse.
    """
    state = {"optimizer": dict(optimizer_state), "extra": dict(extra)}
    _require_plain(state, "state")
    blobs: dict[str, Blob] = {
        MODEL: safetensors_file.encoded(model_state),
        STATE: _state_bytes(state),
        META: json.dumps(asdict(meta)).encode(),
    }
    return blobs | {MANIFEST: _manifest(blobs)}


def read_verified(path: Path) -> dict[str, bytes]:
    """The files of the checkpoint folder `path`, proven to be those that were written, and unparsed.

    Raises:
        CheckpointError: one is missing, empty, truncated or damaged.
    """
    blobs = {}
    for name in (MANIFEST, *_FILES):
        try:
            blobs[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
    if blobs[MANIFEST] != _manifest(blobs):
        raise CheckpointError(_damage(path, blobs))
    return blobs


def decode(
    path: Path, blobs: Mapping[str, bytes]
) -> tuple[Meta, dict[str, Tensor], dict[str, Any]]:
    """What verified files hold: meta, model state, and `{"optimizer": ..., "extra": ...}`.

    Raises:
        CheckpointError: the files were forged, with checksums that fit; nothing in them is run.
    """
    meta = _parsed(path / META, lambda: Meta(**json.loads(blobs[META])))
    model_state = _parsed(path / MODEL, lambda: safetensors.torch.load(blobs[MODEL]))
    return meta, model_state, _parsed(path / STATE, lambda: _parse_state(blobs[STATE]))


def _require_plain(value: Any, name: str) -> None:
    """Raise `CheckpointError` for anything that reading back without pickle would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_plain(key, f"a key of {name}")
            _require_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}[{index}]")
    elif type(value) not in _PLAIN:
        raise CheckpointError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds tensors, "
            "numbers, text, None, and dicts, lists and tuples of them"
        )


def _state_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _parse_state(blob: bytes) -> dict[str, Any]:
    state = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or set(state) != {"optimizer", "extra"}:
        raise ValueError("it does not hold an optimizer's state and extra")
    return state


def _parsed(path: Path, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} fits its checksum but is not plain data: {reason}"
        ) from error


def _manifest(blobs: Mapping[str, Blob]) -> bytes:
    entries = {
        name: {"sha256": hashlib.sha256(blobs[name]).hexdigest(), "size": len(blobs[name])}
        for name in _FILES
    }
    return json.dumps(entries, indent=1).encode()


def _damage(path: Path, blobs: Mapping[str, bytes]) -> str:
    """One line on where the bytes read differ from their manifest."""
    found = json.loads(_manifest(blobs))
    try:
        saved = {name: dict(json.loads(blobs[MANIFEST])[name]) for name in _FILES}
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{path / MANIFEST} is {'damaged' if blobs[MANIFEST] else 'empty'}"
    for name in _FILES:
        size, written = found[name]["size"], saved[name].get("size")
        if size != written:
            what = "is empty" if size == 0 else f"has {size} bytes"
            return f"{path / name} {what}, its manifest says {written}"
        if found[name] != saved[name]:
            return f"{path / name} is damaged: its checksum is not the one in its manifest"
    return f"{path / MANIFEST} is damaged"
