"""Which way is up: of what is measured, what is better when it is lower, and what when it is higher.

The decision that shaped the file: the direction is known by name for what has one beyond doubt, and has to be said for
everything else, because a gate that guesses it wrong is green when something broke.
"""

from dataclasses import dataclass

from syncbn.compare.reading import Summary
from syncbn.errors import UsageError

_LOWER_IS_BETTER = ("error", "loss", "seconds", "_ms", "_bytes", "diverged", "steps_to_target")
_HIGHER_IS_BETTER = ("accuracy", "cells_trained")
_TIMES = ("seconds", "_ms")


@dataclass(frozen=True)
class Metric:
    """What is compared, and which way is up."""

    name: str
    lower_is_better: bool = True


def metric_of(text: str) -> Metric:
    """The metric that `text` names: `test_error`, or `name:lower` and `name:higher`, which say what is better.

    Raises:
        UsageError: no direction is given, and none is known.
    """
    name, _, direction = text.partition(":")
    if direction:
        if direction not in ("lower", "higher"):
            raise UsageError(f"metric={text!r} is not allowed: NAME:lower or NAME:higher")
        return Metric(name, direction == "lower")
    if name.endswith(_HIGHER_IS_BETTER):
        return Metric(name, lower_is_better=False)
    if name.startswith("steps_to_target") or name.endswith(_LOWER_IS_BETTER):
        return Metric(name)
    raise UsageError(
        f"metric={name!r}: say which way is better, {name}:lower or {name}:higher; it goes without saying for errors, "
        "losses, times, bytes, accuracies"
    )


def default_metric(summary: Summary) -> Metric:
    """What the study is about, where that has a better and a worse; else, and for times, the test error.

    Times differ from machine to machine, and with what else runs there.
    """
    primary = summary["design"].get("primary_metric") or "test_error"
    try:
        metric = metric_of(primary)
    except UsageError:
        return Metric("test_error")
    return Metric("test_error") if primary.endswith(_TIMES) else metric
