"""A study in words: its arms, its setting, its contrasted pair, the split that it was measured on.

Every figure's caption begins with the same `setting`, so it says on what it was measured, and whether ranks were real.
"""

import re
from dataclasses import replace

from syncbn.compare.measure import DEFAULT, Measure, measure, shown
from syncbn.compare.report.words.numbers import TIMES, labelled, value_words
from syncbn.compare.report.words.text import capital
from syncbn.compare.study.summary import (
    Summary,
    among,
    arms_with,
    contrast,
    median_of,
    shown_arms,
    values_of,
)

ARM_WORDS = {
    "none": "no norm",
    "bn": "batch norm",
    "local": "local batch norm",
    "local_avg": "local batch norm, averaged buffers",
    "sync": "synchronised batch norm",
    "sync_group": "batch norm synchronised in groups",
    "big_batch": "one big batch",
    "torch_sync": "torch's SyncBatchNorm",
    "group_norm": "group norm",
    "ghost": "ghost batch norm",
}


def arm_words(arm: str) -> str:
    """The arm in words; an arm of a study's own keeps its name."""
    return ARM_WORDS.get(arm, arm)


def arm_first(arm: str) -> str:
    """The arm in words as a sentence begins; a name of a study's own stays as it is."""
    return capital(arm_words(arm)) if arm in ARM_WORDS else arm


def setting(summary: Summary) -> str:
    """Where the numbers come from: data, model, ranks and whether they were real, samples, steps, seeds."""
    design = summary["design"]
    count, seeds = design["world_size"], len(design["seeds"])
    ranks = f"{count} {'virtual' if design.get('virtual') else 'real'} rank{'s' * (count != 1)}"
    tier = " · fast tier" if design.get("tier") == "fast" else ""
    return (
        f"{design['data']}, {design['model']} · {ranks} {TIMES} {design['per_rank_batch']} samples"
        f"{_exceptions(summary)} · {design['steps']} steps · {seeds} seed{'s' * (seeds != 1)}{tier}"
    )


def _exceptions(summary: Summary) -> str:
    """Arms that ran on another number of ranks than the study names; virtual ranks are one process each time."""
    design = summary["design"]
    if design.get("virtual"):
        return ""
    others: dict[int, list[str]] = {}
    for arm in shown_arms(summary):
        for count in _world_sizes(summary, arm)[:1]:
            if count != design["world_size"]:
                others.setdefault(int(count), []).append(arm)
    words = [f"{', '.join(arms)}: {n} rank{'s' * (n > 1)}" for n, arms in others.items()]
    return f" ({'; '.join(words)})" if words else ""


def _world_sizes(summary: Summary, arm: str) -> list[float]:
    return [count for count in values_of(summary, arm, "world_size") if count is not None]


def contrast_title(summary: Summary, metric: str) -> str:
    """The two contrasted arms and their medians: `Test error: local batch norm 40.0 %, synchronised 30.0 %`."""
    pair = among(contrast(summary, metric), arms_with(summary, metric) or shown_arms(summary))
    found = [
        f"{arm_words(arm)} {value_words(shown(summary, metric), median_of(summary, arm, metric))}"
        for arm in pair
    ]
    samples = f" at {summary['design']['per_rank_batch']} samples a rank"
    where = samples if summary["design"]["world_size"] > 1 and _alike(summary) else ""
    return f"{capital(split_words(summary, metric))}{where}: {', '.join(found)}"


def _alike(summary: Summary) -> bool:
    """Whether all arms on several ranks have as many."""
    counts = {values[0] for arm in shown_arms(summary) if (values := _world_sizes(summary, arm))}
    return len(counts - {1}) < 2


def goal_words(decides: Measure, goal: float) -> str:
    """A value of the measure that decides, as one to get to: `5.0 % error`, `test iou of 0.800`."""
    value = value_words(decides, goal)
    return f"{value} error" if decides == measure(DEFAULT) else f"{decides.words} of {value}"


def split_words(summary: Summary, metric: str) -> str:
    """The metric in words, with the split it was measured on where that is not the test set."""
    return _on_split(summary, metric).words


def _on_split(summary: Summary, metric: str) -> Measure:
    found = shown(summary, metric)
    if summary["design"]["split"] != "validation":
        return found
    return replace(found, words=re.sub(r"\btest\b", "validation", found.words))


def axis_label(summary: Summary, metric: str) -> str:
    """The metric with its unit, and the split it was measured on where that is not the test set."""
    return labelled(_on_split(summary, metric))
