"""`View`: what a probe sees of a run, which is the run itself and its present step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from syncbn.config import RunConfig
from syncbn.data import DataSets, Split
from syncbn.runtime.base import Runtime
from syncbn.sampling import SampleStream, by_class


@dataclass(frozen=True)
class Batch:
    """What a step trained on, after its backward pass: the gradients are in place, averaged over ranks, unclipped."""

    images: Tensor
    """This rank's share, (n, C, H, W), in the run's dtype and on its device."""
    labels: Tensor
    """int64 (n,)."""
    size: int
    """Samples over all ranks."""
    share: Tensor
    """This rank's share `()` of the mean loss over the global batch."""


@dataclass(frozen=True)
class View:
    """A run between two optimiser steps. Nothing in it may be changed, nor gradients added."""

    cfg: RunConfig
    runtime: Runtime
    sets: DataSets
    stream: SampleStream
    model: nn.Module
    """The network itself, without what averages its gradients over ranks."""
    step: int = 0
    """Optimiser steps done."""
    lr: float = 0.0
    """The learning rate of the step to come."""
    batch: Batch | None = None
    """What the step to come was computed on; None after the last step."""
    lap_s: float | None = None
    """Seconds since probes were done with the step before, in which they did nothing; None at an attempt's first."""

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of parameters and inputs."""
        return getattr(torch, self.cfg.train.dtype_name)

    @property
    def counts(self) -> bool:
        """Whether this step counts for what is summed up over training (`probe.first`)."""
        return self.step >= self.cfg.probe.first

    def fetch(self, split: Split, indices: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """The samples of `split` at `indices` (n,) as the model takes them: images (n, C, H, W), labels (n,)."""
        (samples,) = self.batches(split, [indices], step)
        return samples

    def batches(
        self, split: Split, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`split.batches`, as the model takes them."""
        for images, labels in split.batches(plan, first_step):
            images = images.to(self.runtime.device, self.dtype, non_blocking=True)
            yield images, labels.to(self.runtime.device, non_blocking=True)

    def whole(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """All of `split`, in batches to evaluate."""
        return self.batches(split, torch.arange(len(split)).split(self.cfg.train.eval_batch))

    def probe_images(self) -> Tensor:
        """The first `probe.samples` test images, (n, C, H, W)."""
        test = self.sets.test
        return self.fetch(test, torch.arange(min(self.cfg.probe.samples, len(test))))[0]

    def dealt(self, split: Split, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples of `split` at `indices` (n,), in global batches dealt to (virtual) ranks as in training.

        A last, smaller batch is left out, unless it is the only one.
        """
        size = min(self.cfg.global_batch, len(indices))
        plan = [part for part in indices.split(size) if len(part) == size]
        if self.cfg.train.shares == "by_class":
            plan = [by_class(part, split.labels) for part in plan]
        return self.batches(split, plan)

    def trained_on(self, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The last global batches that were trained on, in the order in which (virtual) ranks shared them."""
        first = max(0, self.step - num_batches)
        plan = (self.stream.batch(step) for step in range(first, self.step))
        return self.batches(self.sets.train, plan, first)
