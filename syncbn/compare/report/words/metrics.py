"""What each metric is called, and its unit, for tables, axes, titles and sentences.

A metric that is not in `_MEASURES` is called by its own name.
"""

from dataclasses import dataclass

PERCENT, POINTS = "%", "points"
"""Units of fractions, shown times 100, and of differences between such fractions."""


@dataclass(frozen=True)
class Measure:
    """A metric for readers."""

    words: str
    unit: str = ""
    """`%` (of a fraction), `points`, `s`, `ms`, `bytes`, `steps`, `cells`, or none."""


_MEASURES = {
    "test_error": Measure("test error", PERCENT),
    "best_error": Measure("best test error", PERCENT),
    "test_error_running": Measure("test error with running statistics", PERCENT),
    "test_error_precise": Measure("test error with precise statistics", PERCENT),
    "test_error_batch": Measure("test error with batch statistics", PERCENT),
    "train_mode_error": Measure("error in training mode", PERCENT),
    "eval_mode_error": Measure("error in evaluation mode", PERCENT),
    "precise_gap": Measure("test error saved by precise statistics", POINTS),
    "leak_gap": Measure("error added by leaving training mode", POINTS),
    "running_mean_gap": Measure("gap of the running mean"),
    "running_var_gap": Measure("gap of the running variance"),
    "batch_dependence": Measure("dependence of an output on its batch"),
    "steps_to_target": Measure("number of steps to the target", "steps"),
    "steps": Measure("steps", "steps"),
    "cells_trained": Measure("number of cells that trained", "cells"),
    "cells": Measure("number of cells", "cells"),
    "quantile_range": Measure("movement of the quantiles"),
    "quantile_range_unit0": Measure("movement of unit 0's quantiles"),
    "shift_slope": Measure("slope of log shift against depth"),
    "shift": Measure("shift of the inputs"),
    "saturation": Measure("share of saturated outputs", PERCENT),
    "grad_norm": Measure("gradient norm"),
    "loss_range": Measure("range of the loss along the gradient"),
    "gradient_predictiveness": Measure("change of the gradient along itself"),
    "effective_beta": Measure("effective beta"),
    "oracle_gap_loss": Measure("relative gap of the loss to one process"),
    "oracle_gap_gradient": Measure("relative gap of the gradient to one process"),
    "oracle_gap_buffers": Measure("relative gap of the running statistics to one process"),
    "oracle_gap_weights": Measure("relative gap of the weights to one process"),
    "train_loss": Measure("training loss"),
    "lr": Measure("learning rate"),
    "seconds": Measure("wall time", "s"),
    "step_ms": Measure("time of a step", "ms"),
    "exchange_ms": Measure("time in exchanges a step", "ms"),
    "exchange_bytes": Measure("number of bytes sent a step", "bytes"),
    "exchange_share": Measure("share of a step in exchanges", PERCENT),
}


def measure(metric: str) -> Measure:
    """Words and unit of `metric`, also of `metric/<layer>` and of `metric@<step>`."""
    whole, _, step = metric.partition("@")
    base, _, layer = whole.partition("/")
    found = _MEASURES.get(base) or Measure(base.replace("_", " "), _unit_of_unknown(base))
    place = f" of layer {layer}" if layer.isdigit() else f" of {layer}" if layer else ""
    return Measure(found.words + place + (f" at step {step}" if step else ""), found.unit)


def _unit_of_unknown(base: str) -> str:
    if base.endswith(("error", "accuracy")):
        return PERCENT
    return next((unit for unit in ("ms", "bytes") if base.endswith(f"_{unit}")), "")


def metric_words(metric: str) -> str:
    """The metric's name as a reader says it: `test_error` is "test error"."""
    return measure(metric).words


def is_share(metric: str) -> bool:
    """Whether the metric is a fraction that is shown in percent."""
    return measure(metric).unit == PERCENT


def factor_of(metric: str) -> int:
    """What a value is multiplied by to be shown: 100 for fractions and their differences."""
    return 100 if measure(metric).unit in (PERCENT, POINTS) else 1
