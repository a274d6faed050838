"""The tables of a report as rows of words: arms with their errors, claims with their verdicts.

The decision that shaped the file: Markdown, HTML and the terminal dress the same rows, so a number is
rounded and worded in one place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.compare import statistics
from syncbn.compare.wording import (
    NOTHING,
    effect_words,
    interval_words,
    median_of,
    p_words,
    range_words,
    threshold_words,
    value_words,
    without_unit,
)

Summary = Mapping[str, Any]
ARM_HEADER = ("arm", "median test error", "95 % interval", "range over seeds", "median time")
TARGET_HEADER = ("reached target", "median steps to it")
CLAIM_HEADER = ("claim", "verdict", "effect", "95 % interval", "claimed", "p (Holm)")


def arm_header(summary: Summary) -> tuple[str, ...]:
    """The head of `arm_rows`; with a target error also the steps to it."""
    return (*ARM_HEADER, *TARGET_HEADER) if _has_target(summary) else ARM_HEADER


def arm_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row an arm under `arm_header`."""
    return [_arm_row(summary, arm) for arm in summary["arms"]]


def _arm_row(summary: Summary, arm: str) -> tuple[str, ...]:
    errors = summary["arms"][arm]["test_error"]
    row = (
        arm,
        value_words("test_error", median_of(summary, arm, "test_error")) + _diverged(summary, arm),
        range_words("test_error", *_interval(errors)),
        _range(errors),
        value_words("seconds", median_of(summary, arm, "seconds")),
    )
    return row + _target_cells(summary["arms"][arm]) if _has_target(summary) else row


def _diverged(summary: Summary, arm: str) -> str:
    number = sum(map(bool, summary["arms"][arm]["diverged"]))
    return f" ({number} diverged)" if number else ""


def _interval(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """95 % interval of the median over seeds, without ends where there are too few."""
    interval = statistics.effect([float("nan") if v is None else v for v in values]).interval
    return (None, None) if interval == statistics.NO_BOUNDS else (interval.low, interval.high)


def _range(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    if not known:
        return NOTHING
    return range_words("test_error", min(known), max(known))


def _has_target(summary: Summary) -> bool:
    return any("steps_to_target" in values for values in summary["arms"].values())


def _target_cells(values: Mapping[str, Sequence[float | None]]) -> tuple[str, str]:
    steps = [float("inf") if step is None else step for step in values["steps_to_target"]]
    found = statistics.steps_to_target(steps)
    return (
        f"{found.reached} of {found.total}",
        NOTHING if found.median is None else f"{found.median:g}",
    )


def claim_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row a claim under `CLAIM_HEADER`."""
    return [
        (
            claim["name"],
            claim["verdict"],
            effect_words(claim, claim["effect"]),
            without_unit(claim, interval_words(claim, claim["ci"])),
            without_unit(claim, threshold_words(claim)),
            p_words(claim["p_holm"]).removeprefix("= "),
        )
        for claim in summary["claims"]
    ]
