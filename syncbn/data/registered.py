"""Data sets of extensions: any map-style Dataset of (input, target), cut into batches like the others."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.config import DataConfig
from syncbn.data.augment import Augment
from syncbn.data.source import Source, Split
from syncbn.errors import DataError, SyncbnError
from syncbn.registry import DATA


def read_registered(cfg: DataConfig) -> Source:
    """Both splits of the data set that `cfg` names, as an extension builds them.

    Raises:
        DataError: it cannot be built, is no map-style Dataset, is empty, or its samples are not (input, target).
    """
    train, test = (_built(cfg, split) for split in ("train", "test"))
    x, target = train.sample(0)
    if x.dim() != 3:
        raise DataError(
            f"{train.what}: inputs have shape {tuple(x.shape)}: (channels, height, width) is needed"
        )
    shape = x.shape[0], x.shape[1], x.shape[2]
    num_outputs = _num_outputs(train)
    if not target.is_floating_point() and target.dim() == 0:
        train, test = (replace(one, num_classes=num_outputs) for one in (train, test))
    return Source(train, test, num_outputs, shape, mirrors=False)


def _built(cfg: DataConfig, split: str) -> "DatasetSamples":
    entry, what = DATA[cfg.name], f"data={cfg.name} ({split})"
    try:
        dataset = entry.build(Path(cfg.root).expanduser(), split, **entry.keywords(cfg))
    except SyncbnError:
        raise
    except Exception as error:
        raise DataError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
    if not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
        raise DataError(
            f"{what} is a {type(dataset).__name__}: a map-style Dataset is needed, with __getitem__ and __len__"
        )
    if not len(dataset):
        raise DataError(f"{what} has no samples")
    indices = torch.arange(len(dataset))
    return DatasetSamples(cast(Dataset[Any], dataset), indices, what, cfg.num_loaders)


def _num_outputs(samples: "DatasetSamples") -> int:
    """What `num_classes` a model is built with: classes, or the values of a float target."""
    dataset: Any = samples.dataset
    if isinstance(count := getattr(dataset, "num_classes", None), int):
        return count
    if isinstance(classes := getattr(dataset, "classes", None), Sized):
        return len(classes)
    _, target = samples.sample(0)
    if isinstance(target, Tensor) and target.is_floating_point():
        return target.numel()
    return int(samples.labels.max()) + 1


@dataclass(frozen=True)
class DatasetSamples:
    """The samples of `dataset` at `indices`, called `what` in errors; targets lie below `num_classes`, if it is set."""

    dataset: Dataset[Any]
    indices: Tensor
    what: str
    num_loaders: int
    num_classes: int | None = None

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
            given = [self.sample(i)[1] for i in range(len(self))]
            targets = torch.stack(given)
        else:
            targets = torch.as_tensor(given)[self.indices]
        if targets.dim() != 1 or targets.is_floating_point():
            raise DataError(
                f"{self.what} has targets of shape {tuple(targets.shape[1:])} and {targets.dtype}, no classes"
            )
        return targets.to(torch.int64)

    def take(self, indices: Tensor) -> "DatasetSamples":
        """The samples at `indices`, renumbered from 0."""
        return replace(self, indices=self.indices[indices])

    def split(self, augment: Augment | None) -> Split:
        """A split that fetches each sample when it is wanted."""
        del augment  # an extension varies its images itself
        return DatasetSplit(self)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and target of one sample as tensors.

        Raises:
            DataError: it cannot be fetched, or is not (input tensor, target).
        """
        at = int(self.indices[index])
        try:
            x, target = self.dataset[at]
            x, target = torch.as_tensor(x), torch.as_tensor(target)
        except SyncbnError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.what}: sample {at} is no pair of tensors (input, target): {type(error).__name__}: {error}"
            ) from error
        classes = self.num_classes
        if classes is not None and target.dim() == 0 and not 0 <= int(target) < classes:
            raise DataError(
                f"{self.what}: sample {at} has target {int(target)}: allowed are 0 to {classes - 1}"
            )
        return x, target


class DatasetSplit:
    """A split over an extension's data set."""

    def __init__(self, samples: DatasetSamples) -> None:
        self._samples = samples
        self._first = samples.sample(0)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def labels(self) -> Tensor:
        """See `Split.labels`."""
        return self._samples.labels

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`.

        Raises:
            DataError: a sample that cannot be fetched, or is of another shape than the first.
        """
        del first_step
        loader = DataLoader(
            _Tensors(self._samples),
            batch_sampler=(at.tolist() for at in plan),  # pyright: ignore[reportArgumentType]  # any iterable will do
            num_workers=self._samples.num_loaders,
            collate_fn=self._collate,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        try:
            yield from loader
        except DataError as error:  # from a loader process, it comes with that process's traceback
            line = str(error).strip().splitlines()[-1]
            raise DataError(line.removeprefix("syncbn.errors.DataError: ")) from None

    def _collate(self, items: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Inputs (n, *) and targets (n, *), also for n = 0."""
        x, target = self._first
        for index, one, aim in items:
            if one.shape != x.shape or aim.shape != target.shape:
                raise DataError(
                    f"{self._samples.what}: sample {index} has an input of shape {tuple(one.shape)} and a target of "
                    f"shape {tuple(aim.shape)}, sample 0 {tuple(x.shape)} and {tuple(target.shape)}: make them equal"
                )
        if not items:
            return x.new_empty((0, *x.shape)), target.new_empty((0, *target.shape))
        return torch.stack([one for _, one, _ in items]), torch.stack([aim for *_, aim in items])


class _Tensors(Dataset[tuple[int, Tensor, Tensor]]):
    """Samples with their index."""

    def __init__(self, samples: DatasetSamples) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, *self._samples.sample(index)
