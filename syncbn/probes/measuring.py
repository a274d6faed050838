"""The error of a network on batches of its own, in whatever mode it is in."""

from collections.abc import Iterable

import torch
from torch import Tensor

from syncbn.probes.view import View


@torch.no_grad()
def error_rate(view: View, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of wrongly classified samples in `batches` of images and labels, as the model stands."""
    wrong = samples = 0
    for images, labels in batches:
        wrong += int((view.model(images).argmax(1) != labels).sum())
        samples += len(labels)
    return wrong / samples
