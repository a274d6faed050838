"""Weights that a run starts from: read without running code, fitted to the network by name, and reported.

Rank 0 reads and gives every tensor to the others, so that a file need lie on its machine alone.
"""

import hashlib
import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from syncbn.checkpoint import load
from syncbn.config import RunConfig
from syncbn.errors import CheckpointError
from syncbn.runtime.base import Runtime
from syncbn.train.published import published
from syncbn.weights import find

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every name: DistributedDataParallel, torch.compile, and trainers' own modules."""
_INSIDE = ("state_dict", "model_state_dict", "model")
"""Where a file that holds more than a state_dict often has it."""
_NAMED = 3
"""Names that a report gives of each kind."""


@dataclass
class Report:
    """What of the weights fitted the network."""

    source: str
    sha256: str
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    """Of the network, and not among the weights."""
    unexpected: list[str] = field(default_factory=list)
    """Among the weights, and not of the network."""
    different: list[str] = field(default_factory=list)
    """Of another shape: the name, with both."""
    left_out: list[str] = field(default_factory=list)
    """Of the output layer, with `model.weights_match=backbone`."""

    def to_dict(self) -> dict[str, Any]:
        """As the journal records it: counts, and the first few names of each kind."""
        lists = {kind: names for kind, names in asdict(self).items() if isinstance(names, list)}
        counts = {kind: len(names) for kind, names in lists.items()}
        first = {kind: names[:_NAMED] for kind, names in lists.items() if names}
        plain = {"source": self.source, "sha256": self.sha256, "loaded": self.loaded}
        return plain | counts | {"first": first}

    def in_words(self) -> str:
        """On one line."""
        parts = [f"{kind} {listed(names)}" for kind, names in self._odd().items()]
        return "; ".join([f"{self.loaded} tensors of {self.source} loaded", *parts])

    def _odd(self) -> dict[str, list[str]]:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.different,
            "left out": self.left_out,
        }
        return {kind: names for kind, names in kinds.items() if names}


def load_weights(model: nn.Module, cfg: RunConfig, runtime: Runtime) -> Report | None:
    """Give `model` the weights that `cfg.model` names; a collective. The report is rank 0's alone.

    Raises:
        UsageError: they are not there, or published under no such name.
        CheckpointError: damaged, not plain tensors, another content than when the run was planned, or weights that do
            not fit the network as `cfg.model.weights_match` demands.
    """
    report = None
    if runtime.is_main:
        state, sha256 = read(cfg)
        report = Report(str(cfg.model.weights), sha256)
        chosen = fit(model, state, cfg.model.weights_match, report)
        model.load_state_dict(chosen, strict=False)
        sys.stderr.write(f"weights: {report.in_words()}\n")
    for tensor in model.state_dict().values():
        tensor.copy_(runtime.from_main(tensor.to(runtime.device)))
    return report


def read(cfg: RunConfig) -> tuple[dict[str, Tensor], str]:
    """The tensors that `cfg.model.weights` names, on the CPU, and the sha256 of their source.

    Of a run these are those that it evaluates with: averages of its parameters, with `train.ema`.

    Raises:
        UsageError: see `syncbn.weights.find` and `published`.
        CheckpointError: damaged, not plain tensors, or another content than `cfg.model.weights_sha256`.
    """
    source = find(cfg)
    if source.kind == "checkpoint":
        saved = load(source.path)
        state, sha256 = saved.model_state | saved.extra.get("ema", {}), source.sha256
    else:
        path = published(cfg.model) if source.kind == "published" else source.path
        state, sha256 = _file(path)
    if cfg.model.weights_sha256 not in (None, sha256):
        raise CheckpointError(
            f"model.weights={cfg.model.weights} has changed since the run was planned: its sha256 is {sha256}, not "
            f"{cfg.model.weights_sha256}"
        )
    return state, sha256


def fit(
    model: nn.Module, state: Mapping[str, Tensor], match: str, report: Report
) -> dict[str, Tensor]:
    """What of `state` is loaded into `model`; the rest is written into `report`.

    Args:
        model: the network.
        state: tensors by name, prefixes of wrappers allowed.
        match: `all`, `backbone` (all but the output layer) or `any` (what fits).
        report: filled in.

    Raises:
        CheckpointError: they do not fit.
    """
    own, state = model.state_dict(), _unwrapped(state, model.state_dict())
    head = output_layer(model)
    if match == "backbone":
        report.left_out = [name for name in own if name.startswith(head)]
        own = {name: tensor for name, tensor in own.items() if not name.startswith(head)}
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    chosen = {n: t for n, t in state.items() if n in own and t.shape == own[n].shape}
    report.loaded = len(chosen)
    report.missing = [
        name for name in own if name not in state and not name.endswith("num_batches_tracked")
    ]
    report.unexpected = [name for name in state if name not in own]
    report.different = [
        f"{name} {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and name not in chosen
    ]
    _require_match(report, match, head)
    return chosen


def output_layer(model: nn.Module) -> str:
    """The prefix of the names of the last layer with a matrix or a kernel, as `fc.`."""
    layers = [
        name
        for name, module in model.named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
    return f"{layers[-1]}." if layers else "."


def listed(names: list[str]) -> str:
    """How many, and the first few of them."""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(names[:_NAMED])}{more})"


def _require_match(report: Report, match: str, head: str) -> None:
    odd = [*report.missing, *report.unexpected, *report.different]
    if not report.loaded:
        raise CheckpointError(f"no tensor of model.weights fits: {report.in_words()}")
    if match == "any" or not odd:
        return
    only_head = match == "all" and all(name.startswith(head) for name in odd)
    remedy = "backbone leaves the output layer as it is" if only_head else "any loads what fits"
    raise CheckpointError(
        f"model.weights does not fit this model: {report.in_words()}; model.weights_match={remedy}"
    )


def _file(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in a file, parsed from the very bytes whose sha256 is returned."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        state = _parsed(path, data)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise CheckpointError(
            f"{path} holds no weights that can be read without running code: {reason or type(error).__name__}"
        ) from error
    return state, hashlib.sha256(data).hexdigest()


def _parsed(path: Path, data: bytes) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load(data)
    found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for key in _INSIDE:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise ValueError(f"a state_dict is needed, it holds a {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, tensors by name are needed")
    return dict(found)


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes that wrappers put before every name."""
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if _all(state, p) and not _all(own, p)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _all(names: Iterable[str], prefix: str) -> bool:
    names = list(names)
    return bool(names) and all(name.startswith(prefix) for name in names)
