"""Data sets in memory.

What is neither augmented nor transformed is normalised once: fetching two MNIST samples then costs 8 us instead of 37.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncbn.data.chance import isolated
from syncbn.data.loaders import Loading, pinned
from syncbn.data.source import FetchedSplit, Samples, Split, as_classes, require_floating
from syncbn.data.transforms import Shape, Treatment

READY_BYTES = 256 * 2**20
"""A set whose float32 images take no more than this is normalised once; MNIST takes 180 MiB."""


def unchanged(images: Tensor) -> Tensor:
    """The preparation of what needs none."""
    return images


@dataclass(frozen=True)
class TensorSamples(Samples):
    """Samples in memory.

    Args:
        images: (N, C, H, W), uint8 from 0 to 255 or float32.
        targets: (N, *); classes are int64 (N,).
        prepare: raw images (n, C, H, W) to what the model sees, float32 of the same shape.
        num_classes: see `Samples`.
        mirrors: see `Samples`.
        what: see `Samples`.
    """

    images: Tensor
    targets: Tensor
    prepare: Callable[[Tensor], Tensor] = unchanged
    num_classes: int | None = None
    mirrors: bool = False
    what: str = "data"

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Tensor:
        """See `Samples.labels`; raises `DataError` for targets that are no classes."""
        return as_classes(self.targets, self.what)

    def target(self) -> Tensor:
        """See `Samples.target`."""
        return self.targets[0]

    def take(self, indices: Tensor) -> "TensorSamples":
        """The samples at `indices`, copied."""
        return replace(self, images=self.images[indices], targets=self.targets[indices])

    def split(self, treatment: Treatment, loading: Loading) -> Split:
        """A split that prepares now where nothing is done to samples and memory allows, else batch by batch."""
        if treatment or 4 * self.images.numel() > READY_BYTES:
            return FetchedSplit(self, treatment, loading)
        images = self.prepare(self.images)
        require_floating(images, self.what)
        return ReadySplit(images, self.targets, loading.pin_memory)

    def fetch(self, step: int, indices: Tensor, treatment: Treatment) -> tuple[Tensor, Tensor]:
        """See `Samples.fetch`."""
        images = self.images.index_select(0, indices)
        targets = self.targets.index_select(0, indices)
        if treatment.augment is not None:
            images = treatment.augment.batch(images, step, indices)
        if treatment.transforms:
            samples = zip(indices.tolist(), images, targets, strict=True)
            with isolated():
                treated = treatment.all_transformed(samples, step, self.name)
            images, targets = treatment.stacked(treated, indices, self.name)
        return self.prepare(images), targets


class ReadySplit:
    """A split whose batches are copies of rows: images float32 (N, C, H, W), targets (N, *)."""

    def __init__(self, images: Tensor, targets: Tensor, pin_memory: bool = False) -> None:
        self._images, self._targets, self._pin_memory = images, targets, pin_memory

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def labels(self) -> Tensor:
        """See `Split.labels`."""
        return as_classes(self._targets, "data")

    @property
    def shape(self) -> Shape:
        """See `Split.shape`."""
        return tuple(self._images.shape[1:])

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`; nothing depends on the step."""
        del first_step
        # index_select costs half of what images[indices] does at two samples.
        rows = (
            (self._images.index_select(0, at), self._targets.index_select(0, at)) for at in plan
        )
        return pinned(rows, self._pin_memory)


def binarized(images: Tensor) -> Tensor:
    """1 where a pixel in [0, 1] is above one half, else 0; float32, same shape."""
    return (images > 0.5).to(torch.float32)
