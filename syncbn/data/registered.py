"""Data sets by name: what the registry builds, read as samples.

Those of the package hand over `Samples` themselves. Those of extensions are map-style Datasets of (input, target), of
which a `TensorDataset` lies in memory as ours do, and any other is asked sample by sample.
"""

from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from syncbn.config import DataConfig
from syncbn.data.chance import isolated, seed_generators
from syncbn.data.memory import TensorSamples
from syncbn.data.source import Samples, as_classes
from syncbn.data.transforms import Treatment
from syncbn.errors import DataError, SyncbnError
from syncbn.registry import DATA
from syncbn.structure import as_tensors


def read(cfg: DataConfig, seed: int) -> tuple[Samples, Samples]:
    """Training and test samples of the data set that `cfg` names; what it draws at random is decided by `seed`.

    Raises:
        DataError: it cannot be built, is no map-style Dataset, is empty, its samples are not (input, target), or its
            two splits have different classes.
    """
    (train, known), (test, others) = (_built(cfg, split, seed) for split in ("train", "test"))
    if known and others and known != others:
        odd = ", ".join(sorted(set(known) ^ set(others)))
        raise DataError(f"data={cfg.name}: classes of the training and the test set differ: {odd}")
    target = train.target()
    num_outputs = _num_outputs(train, target)
    if isinstance(target, Tensor) and target.dim() == 0 and not target.is_floating_point():
        train, test = (one.called(one.what, num_classes=num_outputs) for one in (train, test))
        for one in (train, test):
            _check_labels(one)
        return train, test
    return train.called(train.what, num_classes=num_outputs), test


def _built(cfg: DataConfig, split: str, seed: int) -> tuple[Samples, list[str]]:
    """One split, and the names of its classes where it has them."""
    entry, what = DATA[cfg.name], f"data={cfg.name} ({split})"
    try:
        with isolated():
            seed_generators(seed)
            dataset = entry.build(Path(cfg.root), split, **entry.keywords(cfg))
    except SyncbnError:
        raise
    except Exception as error:
        if cfg.name in DATA.built_in:
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{what} cannot be read: {why}") from error
    classes = getattr(dataset, "classes", None)
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else []
    return _samples_of(dataset, what), names


def _samples_of(dataset: Any, what: str) -> Samples:
    if isinstance(dataset, Samples):
        return dataset.called(what)
    if not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
        raise DataError(
            f"{what} is a {type(dataset).__name__}: a map-style Dataset is needed, with __getitem__ and __len__"
        )
    if not len(dataset):
        raise DataError(f"{what} has no samples")
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return TensorSamples(*dataset.tensors, num_classes=_said_classes(dataset), what=what)
    return DatasetSamples(cast(Dataset[Any], dataset), torch.arange(len(dataset)), what)


def _said_classes(dataset: Any) -> int | None:
    """The number of classes that a data set says it has."""
    count, classes = getattr(dataset, "num_classes", None), getattr(dataset, "classes", None)
    if isinstance(count, int):
        return count
    return len(classes) if isinstance(classes, Sized) else None


def _num_outputs(samples: Samples, target: Any) -> int:
    """What `num_classes` a model is built with: classes, or the values of a float target.

    Raises:
        DataError: targets of several tensors, or of whole numbers that are no classes, say no number.
    """
    if samples.num_classes is not None:
        return samples.num_classes
    if not isinstance(target, Tensor):
        raise DataError(
            f"{samples.what} has targets of type {type(target).__name__}: give the data set num_classes"
        )
    return target.numel() if target.is_floating_point() else int(samples.labels.max()) + 1


def _check_labels(samples: Samples) -> None:
    """Raise `DataError` for a class outside 0 to `num_classes` - 1, where all are at hand."""
    if isinstance(samples, DatasetSamples):
        return  # each when it is fetched
    assert samples.num_classes is not None
    wrong = ((samples.labels < 0) | (samples.labels >= samples.num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise _out_of_range(samples, first, int(samples.labels[first]))


def _out_of_range(samples: Samples, index: int, target: int) -> DataError:
    most = (samples.num_classes or 0) - 1
    allowed = f"allowed are 0 to {most}" if most >= 0 else "classes are counted from 0"
    return DataError(f"{samples.name(index)} has target {target}: {allowed}")


@dataclass(frozen=True)
class DatasetSamples(Samples):
    """The samples of an extension's `dataset` at `indices`; see `Samples` for the other fields."""

    dataset: Dataset[Any]
    indices: Tensor
    what: str
    num_classes: int | None = None
    mirrors: bool = False

    def __post_init__(self) -> None:
        """Take over the number of classes that the data set says it has."""
        if self.num_classes is None:
            object.__setattr__(self, "num_classes", _said_classes(self.dataset))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Classes, int64 (N,), of the data set's `targets` where it has them, else of each sample.

        Raises:
            DataError: targets that are no single whole numbers.
        """
        given: Any = getattr(self.dataset, "targets", None)
        if given is None:
            with isolated():
                targets = torch.stack([self._sample(i)[1] for i in range(len(self))])
        else:
            targets = torch.as_tensor(given)[self.indices]
        return as_classes(targets, self.what)

    def target(self) -> Any:
        """See `Samples.target`."""
        with isolated():
            return self._sample(0)[1]

    def take(self, indices: Tensor) -> "DatasetSamples":
        """See `Samples.take`."""
        return replace(self, indices=self.indices[indices])

    def name(self, index: int) -> str:
        """Called by its index in the data set."""
        return f"{self.what}: sample {int(self.indices[index])}"

    def fetch(self, step: int, indices: Tensor, treatment: Treatment) -> tuple[Tensor, Tensor]:
        """See `Samples.fetch`; what the data set itself draws at random is seeded too.

        Raises:
            DataError: a sample that cannot be fetched, or is of another shape than the first.
        """
        return treatment.stacked(self._treated(step, indices, treatment), indices, self.name)

    def batch(self, step: int, indices: Tensor, treatment: Treatment) -> tuple[Any, Any]:
        """See `Samples.batch`; what a task collates itself need not be of one shape."""
        if treatment.collate is None:
            return self.fetch(step, indices, treatment)
        return treatment.collate(self._treated(step, indices, treatment))

    def _treated(
        self, step: int, indices: Tensor, treatment: Treatment
    ) -> list[tuple[Tensor, Any]]:
        samples = []
        with isolated():
            for index in indices.tolist():
                treatment.seed_for(step, index)
                samples.append(treatment.transformed(*self._sample(index), self.name(index)))
        return samples

    def _sample(self, index: int) -> tuple[Tensor, Any]:
        """Input and target of one sample as tensors; see `as_tensors` for a target of several.

        Raises:
            DataError: it cannot be fetched, or is not (input tensor, target).
        """
        try:
            x, target = self.dataset[int(self.indices[index])]
            x, target = torch.as_tensor(x), as_tensors(target)
        except SyncbnError:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{self.name(index)} is no pair of tensors (input, target): {why}"
            ) from error
        single = isinstance(target, Tensor) and target.dim() == 0
        if single and not target.is_floating_point() and self._lacks(int(target)):
            raise _out_of_range(self, index, int(target))
        return x, target

    def _lacks(self, target: int) -> bool:
        return self.num_classes is not None and not 0 <= target < self.num_classes
