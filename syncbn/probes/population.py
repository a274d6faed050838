"""Probe `population`: what is lost when inference uses running averages in place of the statistics of training.

Ioffe & Szegedy (2015, algorithm 2) infer with population statistics, which running averages only approach. Wu & Johnson
(2021, "Rethinking 'Batch' in BatchNorm", section 3) measure the difference as here: the same network is evaluated with
its running, its precise and its batches' own statistics.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from syncbn.norm import recalibrate
from syncbn.probes.aside import batch_norms, norms_in_training, undisturbed
from syncbn.probes.base import Probe, require_classification, require_one_process
from syncbn.probes.measuring import error_rate
from syncbn.probes.view import View

SAMPLES = 10_000
"""Training samples that make the population: Wu & Johnson find 1 000 to 10 000 enough."""
LONE_SAMPLES = 64


class Population(Probe):
    """The finished network's test error with three kinds of statistics, and how far the first two lie apart.

    Finals:

    * `test_error_running`; `test_error_precise`, with the exact moments of what enters each norm over up to 10 000
      training samples, the first of a fixed permutation, in global batches dealt as in training
      (`syncbn.norm.recalibrate`); `test_error_batch`, with the statistics of test batches of the size of the global
      batch, dealt as in training (a last, smaller batch is left out; dropout is off).
    * `precise_gap`, running - precise.
    * `running_mean_gap`, the median over all channels of |running - precise mean| / precise standard deviation, and
      `running_var_gap`, that of |log(running / precise variance)|, with the norm's eps added to every variance. NaN
      without batch norms.
    * `batch_dependence`, the largest difference between an output in evaluation mode of a sample alone and in a batch
      of 64.

    Raises:
        UsageError: several real ranks; another task than classification.
    """

    def __init__(self, view: View) -> None:
        require_one_process(view, "population")
        require_classification(view, "population")

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        model = view.model.eval()
        running = error_rate(view, view.whole(view.sets.test))
        found = {"batch_dependence": batch_dependence(view)}
        found["test_error_batch"] = _error_with_batch_statistics(view)
        before = _statistics(model)
        precise, gaps = running, (math.nan, math.nan)
        if before:
            recalibrate(model, population(view), process_group=1)
            model.eval()
            precise = error_rate(view, view.whole(view.sets.test))
            gaps = running_gaps(before, _statistics(model), batch_norms(model)[0].eps)
        return found | {
            "test_error_running": running,
            "test_error_precise": precise,
            "precise_gap": running - precise,
            "running_mean_gap": gaps[0],
            "running_var_gap": gaps[1],
        }


def population(view: View) -> Iterator[Tensor]:
    """Images of the training samples that make the population, in batches as the arm trains on."""
    order = np.random.default_rng(0).permutation(len(view.sets.train))[:SAMPLES]
    for images, _ in view.dealt(view.sets.train, torch.from_numpy(order)):
        yield images


def batch_dependence(view: View) -> float:
    """The largest difference that its batch makes to an output of a test sample in evaluation mode."""
    images, _ = view.fetch(view.sets.test, torch.arange(len(view.sets.test))[:LONE_SAMPLES])
    with torch.no_grad():
        together = view.model(images)
        alone = torch.cat([view.model(image) for image in images.split(1)])
    return float((together - alone).abs().max())


def _error_with_batch_statistics(view: View) -> float:
    test = view.sets.test
    with undisturbed(view.model, view.runtime.device), norms_in_training(view.model):
        return error_rate(view, view.dealt(test, torch.arange(len(test))))


Statistics = list[tuple[Tensor, Tensor]]
"""Running mean and variance (C,) of each batch norm."""


def _statistics(model: nn.Module) -> Statistics:
    return [
        (_wide(norm.running_mean), _wide(norm.running_var))
        for norm in batch_norms(model)
        if norm.running_mean is not None and norm.running_var is not None
    ]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float64, copy=True)


def running_gaps(running: Statistics, precise: Statistics, eps: float) -> tuple[float, float]:
    """Medians over all channels of |difference of means| / sd and |log ratio of variances|, eps added to variances."""
    mean, var = (torch.cat(parts) for parts in zip(*running, strict=True))
    true_mean, true_var = (torch.cat(parts) for parts in zip(*precise, strict=True))
    means = (mean - true_mean).abs() / (true_var + eps).sqrt()
    variances = ((var + eps) / (true_var + eps)).log().abs()
    return float(means.quantile(0.5)), float(variances.quantile(0.5))
