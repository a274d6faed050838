"""A run's model as a file that needs neither this package nor the model's own code.

The norms are torch's own, the weights those of a checkpoint, the batch dimension free. Before a file is put in place
its outputs are held against those of the run's model on test samples.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from syncbn.after.trained import Trained
from syncbn.errors import CheckpointError, UsageError

TOLERANCE = 1e-5
"""Largest difference of an output y from the run's own, over 1 + |y|."""
NUM_CHECKED = 16
"""Test samples that a file is checked on."""

Outputs = Callable[[Tensor], Tensor]
"""What a file computes: outputs (n, *) of inputs (n, C, H, W)."""


@dataclass(frozen=True)
class Exported:
    """A model to be written: the plain network, inputs, and what the run makes of them, in float32 or float64."""

    model: nn.Module
    inputs: Tensor
    outputs: Tensor
    metadata: dict[str, str]


def export(run: Trained, to: str, out: Path | None = None) -> dict[str, Any]:
    """Write the model of `run` as `to` (`safetensors`, `pt2` or `onnx`), checked, whole or not at all.

    Args:
        run: the run.
        to: the format.
        out: the file; None means `model.<to>` in the run's folder.

    Returns:
        `file`, `format`, `step`, `bytes`, `dtype`, the shapes `input` and `output` of a sample, and `max_difference`
        from the run's outputs, over 1 + |output|.

    Raises:
        UsageError: what the format needs is not installed, the model cannot be traced, or `out` cannot be written.
        CheckpointError: what was written computes something else.
    """
    write = FORMATS[to]
    file = out or run.found.folder / f"model.{to}"
    require(to, file)
    exported = prepared(run)
    try:
        with tempfile.TemporaryDirectory(prefix=".syncbn-export-", dir=file.parent) as folder:
            beside = Path(folder) / file.name
            outputs = write(exported, beside)
            difference = _checked(exported, outputs, file)
            size = beside.stat().st_size
            os.replace(beside, file)  # noqa: PTH105 - the same folder's file system: at one stroke
    except OSError as error:
        raise UsageError(f"--out {file} cannot be written: {error.strerror}") from error
    return {
        "file": str(file),
        "format": to,
        "step": run.checkpoint.meta.step,
        "bytes": size,
        "dtype": str(exported.inputs.dtype).removeprefix("torch."),
        "input": list(exported.inputs.shape[1:]),
        "output": list(exported.outputs.shape[1:]),
        "max_difference": difference,
    }


def require(to: str, file: Path) -> None:
    """Raise `UsageError` where a file of the format `to` cannot be written here as `file`."""
    missing = [name for name in NEEDS.get(to, ()) if find_spec(name) is None]
    if missing:
        raise UsageError(f"--to {to} needs {' and '.join(missing)}: pip install 'syncbn[export]'")
    if file.is_dir():
        raise UsageError(f"--out {file} is a folder: give a file")
    if not file.parent.is_dir():
        raise UsageError(f"--out {file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise UsageError(f"--out {file}: folder {file.parent} cannot be written")


def prepared(run: Trained) -> Exported:
    """The plain network of `run`, and what the run's own makes of the first test samples.

    A run that trained under autocast is held against its own network in float32.

    Raises:
        UsageError: the model's outputs are no tensor.
    """
    count = min(NUM_CHECKED, len(run.sets.test))
    inputs, _ = next(iter(run.sets.test.batches([torch.arange(count)])))
    inputs = inputs.to(run.dtype)
    with torch.no_grad():
        outputs = run.model(inputs.to(run.device))
    if not isinstance(outputs, Tensor):
        raise UsageError(
            f"model={run.cfg.model.name} gives a {type(outputs).__name__}: only a tensor can be exported"
        )
    metadata = {
        "model": run.cfg.model.name,
        "config_hash": run.checkpoint.meta.config_hash,
        "step": str(run.checkpoint.meta.step),
        "input": f"{str(run.dtype).removeprefix('torch.')} (N, {', '.join(map(str, run.sets.shape))})",
    }
    return Exported(run.plain(), inputs, outputs.cpu(), metadata)


def program(exported: Exported) -> ExportedProgram:
    """The network as a graph of torch's operators over any number of samples.

    Raises:
        UsageError: it cannot be traced.
    """
    one = exported.inputs[:1]
    example = torch.cat([one, one])  # a batch of one sample would be taken for all there is
    try:
        return torch.export.export(
            exported.model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},)
        )
    except Exception as error:
        raise UsageError(
            f"the {type(exported.model).__name__} cannot be exported as a graph: {_first_line(error)}"
        ) from error


def _safetensors(exported: Exported, file: Path) -> Outputs:
    from safetensors.torch import load_file, save

    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in exported.model.state_dict().items()
    }
    # save_file would leave a file that its owner alone may read
    file.write_bytes(save(state, metadata={"format": "pt", **exported.metadata}))
    exported.model.load_state_dict(load_file(file))
    return exported.model


def _pt2(exported: Exported, file: Path) -> Outputs:
    torch.export.save(program(exported), file, extra_files={"run.json": _as_json(exported)})
    return torch.export.load(file).module()


def _onnx(exported: Exported, file: Path) -> Outputs:
    import torch.onnx

    graph = program(exported)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                graph,
                (),
                dynamo=True,
                verbose=False,
                input_names=["input"],
                output_names=["output"],
            )
    except Exception as error:
        raise UsageError(
            f"the {type(exported.model).__name__} has no form in ONNX: {_first_line(error)}"
        ) from error
    assert made is not None
    made.save(file, external_data=False)
    return _onnx_outputs(file)


def _onnx_outputs(file: Path) -> Outputs:
    """What the runtime computes, or ONNX's own reference where that is not installed."""
    if find_spec("onnxruntime") is not None:
        import onnxruntime  # pyright: ignore[reportMissingImports]

        session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(file))
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


FORMATS: dict[str, Callable[[Exported, Path], Outputs]] = {
    "safetensors": _safetensors,
    "pt2": _pt2,
    "onnx": _onnx,
}
"""What writes a file of a format, and gives back what this file computes."""
NEEDS = {"onnx": ("onnx", "onnxscript")}


@torch.no_grad()
def _checked(exported: Exported, outputs: Outputs, file: Path) -> float:
    """The largest difference of `outputs` from the run's, over 1 + |output|, for all samples and for the first alone.

    Raises:
        CheckpointError: it is beyond `TOLERANCE`.
    """
    alone = outputs(exported.inputs[:1])
    found = torch.cat([alone, outputs(exported.inputs)])
    wanted = torch.cat([exported.outputs[:1], exported.outputs])
    difference = float(((found - wanted).abs() / (1 + wanted.abs())).max())
    if not difference <= TOLERANCE:  # a NaN is not
        raise CheckpointError(
            f"{file} was not written: its outputs differ by {difference:.2g} from the run's (at most {TOLERANCE:g})"
        )
    return difference


def _as_json(exported: Exported) -> str:
    return json.dumps(exported.metadata)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
