"""What a reader hands over (raw `Samples`) and what training asks for (`Split`).

Raw samples and ready splits are two things, because augmentation and transforms work on raw pixels, while a set in
memory to which nothing is done is normalised once (`syncbn.data.memory`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from syncbn.data.loaders import Loading, fetched
from syncbn.data.transforms import Shape, Treatment
from syncbn.errors import DataError
from syncbn.structure import part, tensors_of


class Split(Protocol):
    """Labelled images, fetched in batches by index."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        ...

    @property
    def shape(self) -> Shape:
        """Of one input, (C, H, W)."""
        ...

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch for each int64 index tensor (n,) of `plan`, in order; n may be 0.

        Args:
            plan: the samples of each step, read lazily.
            first_step: the step of the plan's first batch; augmentation is decided by it, so a run that
                resumes at a step passes that step.

        Yields:
            images float32 (n, C, H, W), labels int64 (n,).
        """
        ...


class Samples(ABC):
    """Raw samples with targets, before anything is chosen among them or done to them.

    Attributes:
        what: what they are called in errors.
        num_classes: classes, or the values of a float target; None where only the samples tell.
        mirrors: whether a mirrored image still belongs to its class; a mirrored digit does not.
    """

    what: str
    num_classes: int | None
    mirrors: bool

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """Classes, int64 (N,)."""

    @abstractmethod
    def target(self) -> Any:
        """The target of the first sample."""

    @abstractmethod
    def take(self, indices: Tensor) -> Self:
        """The samples at `indices`, renumbered from 0."""

    @abstractmethod
    def fetch(self, step: int, indices: Tensor, treatment: Treatment) -> tuple[Tensor, Tensor]:
        """Inputs (n, *) and targets (n, *) of n > 0 samples as they are at `step`, ready for a model."""

    def batch(self, step: int, indices: Tensor, treatment: Treatment) -> tuple[Any, Any]:
        """What `fetch` gives, collated as the task does it where it has a way of its own."""
        x, target = self.fetch(step, indices, treatment)
        if treatment.collate is None:
            return x, target
        return treatment.collate(list(zip(x, target, strict=True)))

    def name(self, index: int) -> str:
        """What the sample at `index` is called in errors."""
        return f"{self.what}: sample {index}"

    def called(self, what: str, **known: Any) -> Self:
        """The same samples under another name, and with what else is `known` of them."""
        return replace(self, what=what, **known)  # pyright: ignore[reportArgumentType]  # each is a dataclass

    def split(self, treatment: Treatment, loading: Loading) -> Split:
        """These samples as a split, to which `treatment` is done."""
        return FetchedSplit(self, treatment, loading)


def as_classes(targets: Tensor, what: str) -> Tensor:
    """`targets` (N,) as int64.

    Raises:
        DataError: they are no single whole numbers.
    """
    if targets.dim() != 1 or targets.is_floating_point():
        raise DataError(
            f"{what} has targets of shape {tuple(targets.shape[1:])} and {targets.dtype}, no classes"
        )
    return targets.to(torch.int64)


def require_floating(inputs: Tensor, what: str) -> None:
    """Raise `DataError` for inputs that a model would take unscaled."""
    if not inputs.is_floating_point():
        raise DataError(
            f"{what} has inputs of {inputs.dtype}: floating-point is needed, such as x / 255 of uint8"
        )


class FetchedSplit:
    """A split that reads, transforms and prepares samples when they are fetched."""

    def __init__(self, samples: Samples, treatment: Treatment, loading: Loading) -> None:
        self._samples, self._loading = samples, loading
        self._first = x, target = samples.batch(0, torch.tensor([0]), treatment)
        for one in tensors_of(x):
            require_floating(one, samples.what)
        alike = isinstance(x, Tensor) and isinstance(target, Tensor)
        shapes = (tuple(x.shape[1:]), tuple(target.shape[1:])) if alike else None
        self._treatment = replace(treatment, shapes=shapes)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def labels(self) -> Tensor:
        """See `Split.labels`."""
        return self._samples.labels

    @property
    def shape(self) -> Shape:
        """See `Split.shape`."""
        x = self._first[0]
        return tuple(x[0].shape if isinstance(x, list) else next(tensors_of(x)).shape[1:])

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`; a single batch is worth no loader processes.

        Raises:
            DataError: a sample that cannot be fetched, or is of another shape than the first.
        """
        single = isinstance(plan, Sequence) and len(plan) == 1
        loading = Loading(0, self._loading.pin_memory) if single else self._loading
        return fetched(self._fetch, enumerate(plan, first_step), loading)

    def _fetch(self, step: int, indices: Tensor) -> tuple[Any, Any]:
        x, target = self._first
        if not len(indices):
            return part(x, 0, 0), part(target, 0, 0)
        return self._samples.batch(step, indices, self._treatment)
