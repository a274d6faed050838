"""What a run's model says of files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.after.trained import Trained
from syncbn.data.files import SUFFIXES, class_names, file_reader
from syncbn.errors import DataError, UsageError
from syncbn.registry import DATA
from syncbn.tasks import Classification


def files_of(paths: Sequence[Path], any_suffix: bool = False) -> list[Path]:
    """The files that `paths` name, those of a folder in order, with its subfolders.

    Args:
        paths: files and folders.
        any_suffix: take all files of a folder, not images alone.

    Raises:
        DataError: a path that is missing, or a folder without such files.
    """
    return [file for path in paths for file in _files_in(path, any_suffix)]


def _files_in(path: Path, any_suffix: bool) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} is missing: give files or folders of them")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    fitting = [file for file in found if any_suffix or file.suffix.lower() in SUFFIXES]
    if not fitting:
        raise DataError(f"folder {path} holds no {'file' if any_suffix else 'image'}")
    return fitting


def predict(run: Trained, paths: Sequence[Path], top: int) -> Iterator[dict[str, Any]]:
    """For each file of `paths` in turn: `file`, and `classes` (the `top` likeliest) or `values`.

    Raises:
        UsageError: the run's data set has no form in files, or the model's outputs are no tensor.
        DataError: a file that cannot be read, or is no input of this model.
    """
    data = run.cfg.data
    read = file_reader(data)
    files = files_of(paths, any_suffix=data.name not in DATA.built_in)
    classifies = isinstance(run.task, Classification)
    names = class_names(data) if classifies else None
    for start in range(0, len(files), run.cfg.train.eval_batch):
        batch = files[start : start + run.cfg.train.eval_batch]
        outputs = _outputs(run, torch.stack([_input(run, read(file), file) for file in batch]))
        for file, output in zip(batch, outputs, strict=True):
            said = {"classes": _ranked(output, names, top)} if classifies else _values(output)
            yield {"file": str(file), **said}


def _input(run: Trained, x: Tensor, file: Path) -> Tensor:
    if tuple(x.shape) != tuple(run.sets.shape):
        raise DataError(
            f"{file} gives an input of shape {tuple(x.shape)}: the run's are {tuple(run.sets.shape)}"
        )
    return x


@torch.no_grad()
def _outputs(run: Trained, inputs: Tensor) -> Tensor:
    """The model's outputs (n, *) in float32 or float64, on the CPU."""
    with run.autocast():
        outputs = run.model(inputs.to(run.device, run.dtype))
    if not isinstance(outputs, Tensor):
        raise UsageError(
            f"model={run.cfg.model.name} gives a {type(outputs).__name__}: predict shows tensors only"
        )
    return outputs.cpu().to(run.dtype)


def _ranked(logits: Tensor, names: list[str] | None, top: int) -> list[dict[str, Any]]:
    """The `top` likeliest classes of `logits` (num_classes,)."""
    best = logits.double().softmax(0).topk(min(top, len(logits)))
    return [
        {"class": index, "name": _name(names, index), "probability": share}
        for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _name(names: list[str] | None, index: int) -> str:
    """What the data set calls a class; its number where it names none, or fewer than there are."""
    return names[index] if names and index < len(names) else str(index)


def _values(output: Tensor) -> dict[str, Any]:
    return {"values": output.tolist()}
