"""What a reader hands over (`Source` of raw `Samples`) and what training asks for (`Split`), and both in memory.

Raw samples and ready splits are two things, because augmentation works on raw pixels, while a set that is not
augmented is normalised once: fetching two MNIST samples then costs 8 us instead of 37 us.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from syncbn.data.augment import Augment

READY_BYTES = 256 * 2**20
"""A set whose float32 images take no more than this is normalised once; MNIST takes 180 MiB."""


class Split(Protocol):
    """Labelled images, fetched in batches by index."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
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


class Samples(Protocol):
    """Labelled raw images, before anything is chosen among them or done to them."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        ...

    def take(self, indices: Tensor) -> "Samples":
        """The samples at `indices`, renumbered from 0."""
        ...

    def split(self, augment: Augment | None) -> Split:
        """These samples as a split, augmented or not."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set as read: raw samples of one image `shape` = (C, H, W)."""

    train: Samples
    test: Samples
    num_classes: int
    shape: tuple[int, int, int]
    mirrors: bool
    """Whether a mirrored image still belongs to its class; a mirrored digit does not."""


@dataclass(frozen=True)
class TensorSamples:
    """Samples in memory.

    Args:
        images: (N, C, H, W), uint8 from 0 to 255 or float32.
        labels: int64 (N,).
        prepare: raw images (n, C, H, W) to what the model sees, float32 of the same shape.
    """

    images: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "TensorSamples":
        """The samples at `indices`, copied."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def split(self, augment: Augment | None) -> Split:
        """A split that prepares now where nothing is augmented and memory allows, else batch by batch."""
        if augment is None and 4 * self.images.numel() <= READY_BYTES:
            return ReadySplit(self.prepare(self.images), self.labels)
        return RawSplit(self, augment)


class ReadySplit:
    """A split whose batches are copies of rows: images float32 (N, C, H, W), labels int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`; nothing depends on the step."""
        del first_step
        for indices in plan:
            # index_select costs half of what images[indices] does at two samples.
            yield self._images.index_select(0, indices), self.labels.index_select(0, indices)


class RawSplit:
    """A split that augments and prepares each batch when it is fetched."""

    def __init__(self, samples: TensorSamples, augment: Augment | None) -> None:
        self._samples = samples
        self._augment = augment

    def __len__(self) -> int:
        return len(self._samples.labels)

    @property
    def labels(self) -> Tensor:
        """See `Split.labels`."""
        return self._samples.labels

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`."""
        for step, indices in enumerate(plan, first_step):
            images = self._samples.images.index_select(0, indices)
            if self._augment is not None and len(indices):
                images = self._augment.batch(images, step, indices)
            yield self._samples.prepare(images), self._samples.labels.index_select(0, indices)


def binarized(images: Tensor) -> Tensor:
    """1 where a pixel in [0, 1] is above one half, else 0; float32, same shape."""
    return (images > 0.5).to(torch.float32)
