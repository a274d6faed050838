"""How a measure is shown: its name in words, its unit, and which way is better, for tables, axes, titles, sentences.

A study is about the measure that its task decides by. What it is called and whether it is a share of the samples stands
in the study's summary, so that a report made from the summary alone says the same. A metric that is in neither is
called by its own name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from syncbn.config import TaskConfig
from syncbn.registry import TASKS

PERCENT, POINTS = "%", "points"
"""Units of fractions, shown times 100, and of differences between such fractions."""


@dataclass(frozen=True)
class Measure:
    """A metric for readers."""

    words: str
    unit: str = ""
    """Behind a value: `%` (of a fraction), `points`, `s`, `ms`, `bytes`, `steps`, `cells`, or none."""
    name: str = ""
    """The metric: `test_error`."""
    lower_is_better: bool = True
    scale: str = ""
    """On an axis, where no unit stands behind a value: `units of the targets`."""

    @property
    def is_share(self) -> bool:
        """Whether it is a fraction that is shown in percent."""
        return self.unit == PERCENT

    @property
    def factor(self) -> int:
        """What a value is multiplied by to be shown: 100 for fractions and their differences."""
        return 100 if self.unit in (PERCENT, POINTS) else 1

    @property
    def sign(self) -> float:
        """What a value is multiplied by so that less is better."""
        return 1.0 if self.lower_is_better else -1.0

    @property
    def worst(self) -> float:
        """What stands for a value that a run which diverged does not have."""
        return self.sign * float("inf")

    def better(self, value: Any, other: Any) -> Any:
        """Whether `value`, a number or an array, is as good as `other` or better."""
        return self.sign * value <= self.sign * other


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


_OF_SAMPLES = ("train_mode_error", "eval_mode_error", "precise_gap", "leak_gap")
"""What probes measure in the unit of the task's error."""
_REGRESSION = {
    "error": Measure("test mean absolute error", scale="units of the targets"),
    "loss": Measure("test mean squared error", scale="squared units of the targets"),
    "r2": Measure("test coefficient of determination", lower_is_better=False),
}
DEFAULT = "test_error"


def measure(metric: str | Measure) -> Measure:
    """Words and unit of `metric` by its name, also of `metric/<layer>` and of `metric@<step>`."""
    if isinstance(metric, Measure):
        return metric
    base, place = _parts(metric)
    found = _MEASURES.get(base) or Measure(base.replace("_", " "), _unit_of_unknown(base))
    return replace(found, words=found.words + place, name=metric)


def _parts(metric: str) -> tuple[str, str]:
    """The metric's name, and its layer and step in words."""
    whole, _, step = metric.partition("@")
    base, _, layer = whole.partition("/")
    place = f" of layer {layer}" if layer.isdigit() else f" of {layer}" if layer else ""
    return base, place + (f" at step {step}" if step else "")


def _unit_of_unknown(base: str) -> str:
    if base.endswith(("error", "accuracy")):
        return PERCENT
    return next((unit for unit in ("ms", "bytes") if base.endswith(f"_{unit}")), "")


def deciding(cfg: TaskConfig) -> Measure:
    """The measure that the task in `cfg` decides by.

    Raises:
        UsageError: the task of an extension cannot be built.
    """
    return of_task(cfg, f"test_{_task(cfg).decides}")


def of_task(cfg: TaskConfig, metric: str) -> Measure:
    """How `metric` is shown where the task in `cfg` is trained.

    Errors are shares of the samples where a task classifies, and plain numbers where it does not: what they count is
    the task's own.

    Raises:
        UsageError: see `deciding`.
    """
    task, found = _task(cfg), measure(metric)
    base, place = _parts(metric)
    kind, _, own = base.partition("_")
    if kind not in ("test", "best") and base not in _OF_SAMPLES:
        return found
    if not task.classifies:
        found = replace(found, unit="")
    if own in task.words:
        found = replace(task.words[own], name=metric, words=task.words[own].words + place)
    elif kind == "best":
        found = replace(found, words=f"test {own.replace('_', ' ')}{place}")
    if kind == "best":
        found = replace(found, words=f"best {found.words.removeprefix('best ')}")
    return found if own != task.decides else replace(found, lower_is_better=task.lower_is_better)


@dataclass(frozen=True)
class _Task:
    """What of a task decides how its measures are shown."""

    decides: str
    lower_is_better: bool
    classifies: bool
    words: Mapping[str, Measure] = field(default_factory=dict)


def _task(cfg: TaskConfig) -> _Task:
    if cfg.name == "regression":
        return _Task("error", True, False, _REGRESSION)
    if cfg.name in TASKS.built_in:
        return _Task("error", True, True)
    tasks = import_module("syncbn.tasks")  # with torch, which the extension has imported already
    task = tasks.build_task(cfg)
    return _Task(task.decides, task.lower_is_better, isinstance(task, tasks.Classification))


def given(cfg: TaskConfig) -> tuple[str, ...]:
    """The measures that the task in `cfg` is known to give, as far as its config says: `test_loss`, `test_error`, ...

    Raises:
        UsageError: see `deciding`.
    """
    names = ["test_loss", deciding(cfg).name]
    if cfg.name == "regression":
        names.append("test_r2")
    if cfg.name == "classification" and cfg.top > 1:
        names.append(f"test_error_top{cfg.top}")
    if cfg.name == "classification" and cfg.confusion:
        names.append("test_macro_accuracy")
    return tuple(names)


def as_design(cfg: TaskConfig, metrics: Iterable[str]) -> dict[str, Any]:
    """What a summary keeps for `shown`: the measure that decides, and those that are not as their names say."""
    found = {name: of_task(cfg, name) for name in metrics}
    return {
        "decides": deciding(cfg).name,
        "measures": {m: asdict(own) for m, own in found.items() if own != measure(m)},
    }


def shown(summary: Mapping[str, Any], metric: str) -> Measure:
    """How `metric` is shown in the study of `summary`."""
    design = summary["design"]
    base, place = _parts(metric)
    own = (design.get("measures") or {}).get(base)
    if own is None:
        return measure(metric)
    return replace(Measure(**own), words=own["words"] + place, name=metric)


def decided_by(summary: Mapping[str, Any]) -> Measure:
    """The measure that the study of `summary` compares: the one that its task decides by."""
    return shown(summary, summary["design"].get("decides") or DEFAULT)


def primary_of(summary: Mapping[str, Any]) -> str:
    """The metric that the study of `summary` is about."""
    return summary["design"].get("primary_metric") or decided_by(summary).name


def of_claim(claim: Mapping[str, Any]) -> Measure:
    """How the metric of a claim is shown, which the summary keeps with the claim."""
    own = claim.get("measure")
    return Measure(**own) if own else measure(claim["metric"])
