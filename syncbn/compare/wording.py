"""Numbers, arms and verdicts in words, as the figures, the report and the terminal share them.

The decision that shaped the file: whatever a reader meets is made from `summary.json` alone, so three
places cannot tell three stories. `None` stands for what JSON has no number for, and reads as a dash.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

ARM_WORDS = {
    "none": "no norm",
    "local": "local batch norm",
    "local_avg": "local batch norm, averaged buffers",
    "sync": "synchronised",
    "sync_group": "synchronised in groups",
    "big_batch": "one big batch",
    "torch_sync": "torch's SyncBatchNorm",
    "group_norm": "group norm",
    "ghost": "ghost batch norm",
}
VERDICTS = ("REPRODUCED", "NOT REPRODUCED", "INCONCLUSIVE")
NOTHING, TIMES, MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


def arm_words(arm: str) -> str:
    """The arm in words; an arm of a study's own keeps its name."""
    return ARM_WORDS.get(arm, arm)


def metric_words(metric: str) -> str:
    """The metric's name as a reader says it: `test_error` is "test error"."""
    return metric.replace("_", " ")


def is_share(metric: str) -> bool:
    """Whether the metric is a fraction that is shown in percent."""
    return metric.endswith(("error", "accuracy"))


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, without an exponent where it has none to spare."""
    if value is None:
        return NOTHING
    text = f"{value:#.{digits}g}".rstrip(".")
    text = f"{value:.0f}" if "e+" in text and abs(value) < 1e6 else text
    return text.replace("-", MINUS)


def value_words(metric: str, value: float | None) -> str:
    """A measured value with its unit: `5.9 %`, `1.23 s`, `0.041`."""
    if value is None:
        return NOTHING
    if is_share(metric):
        return f"{_percent(value)} %"
    return f"{number(value)} s" if metric == "seconds" else number(value)


def range_words(metric: str, low: float | None, high: float | None) -> str:
    """Two values of a metric with their unit once: `5.6 to 6.4 %`."""
    if low is None or high is None:
        return NOTHING
    return f"{value_words(metric, low).removesuffix(' %')} to {value_words(metric, high)}"


def _percent(value: float) -> str:
    return f"{100 * value:z.1f}".replace("-", MINUS)


def effect_words(claim: Mapping[str, Any], value: float | None) -> str:
    """An effect, an interval's end or a threshold of `claim` with its unit: `-30.1 points`, `x0.42`."""
    if value is None:
        return NOTHING
    if claim["scale"] == "ratio":
        return f"{TIMES}{number(value)}"
    return f"{effect_number(claim, value)}{_unit(claim)}"


def effect_number(claim: Mapping[str, Any], value: float | None) -> str:
    """An effect of `claim` without its unit, with its sign."""
    if value is None:
        return NOTHING
    if claim["scale"] == "ratio":
        return number(value)
    text = _percent(value) if is_share(claim["metric"]) else number(value)
    return text if text.startswith(MINUS) or not float(text) else f"+{text}"


def _unit(claim: Mapping[str, Any]) -> str:
    if is_share(claim["metric"]):
        return " points"
    return " s" if claim["metric"] == "seconds" else ""


def interval_words(claim: Mapping[str, Any], ends: Sequence[float | None]) -> str:
    """An interval of `claim`, in the unit of its effect: `-38.3 to -24.9 points`."""
    if None in ends:
        return NOTHING
    sign = TIMES if claim["scale"] == "ratio" else ""
    return f"{sign}{effect_number(claim, ends[0])} to {effect_words(claim, ends[1])}"


def without_unit(claim: Mapping[str, Any], words: str) -> str:
    """`words` about `claim` for a cell beside its effect, which names the unit already."""
    return words.removesuffix(_unit(claim))


def threshold_words(claim: Mapping[str, Any]) -> str:
    """What the claim demands: `below -20.0 points`, `within ±2.0 points`."""
    threshold = claim["threshold"]
    if claim["kind"] == "equivalent" and claim["scale"] == "ratio":
        return f"within {TIMES}{number(1 / threshold)} to {TIMES}{number(threshold)}"
    if claim["kind"] == "equivalent":
        return "within ±" + effect_words(claim, threshold).lstrip("+")
    side = "below" if claim["kind"] == "less" else "above"
    return f"{side} {effect_words(claim, threshold)}"


def comparison_words(claim: Mapping[str, Any]) -> str:
    """What is compared: `test error, sync - local`."""
    sign = "/" if claim["scale"] == "ratio" else MINUS
    return f"{metric_words(claim['metric'])}, {claim['arm']} {sign} {claim['against']}"


def verdict_sentence(claim: Mapping[str, Any]) -> str:
    """The evidence for the verdict on `claim`, in one or two plain sentences."""
    compared = comparison_words(claim)
    found = effect_words(claim, claim["effect"])
    if None not in claim["ci"]:
        found += f", 95 % interval {interval_words(claim, claim['ci'])} over {claim['n']} seeds"
    if claim["effect"] is None:
        found = "no effect can be given"
    return f"{compared[0].upper()}{compared[1:]}: {found}. {_conclusion(claim)}"


def _conclusion(claim: Mapping[str, Any]) -> str:
    demand = threshold_words(claim)
    if claim["note"]:
        return f"Claimed was {demand}; undecided, because {claim['note']}."
    if claim["verdict"] == "INCONCLUSIVE":
        return f"Claimed was {demand}; these seeds cannot tell."
    if claim["verdict"] == "NOT REPRODUCED":
        return f"Claimed was {demand}; the whole interval lies elsewhere."
    if claim["kind"] == "equivalent":
        return f"Both one-sided tests put it {demand}, as claimed (p {p_words(claim['p_holm'])})."
    return f"The whole interval lies {demand}, as claimed."


def p_words(p: float) -> str:
    """A p value after its sign: `= 0.031`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many claims were reproduced: `2 of 3 claims reproduced, 1 inconclusive`."""
    if not claims:
        return "No claim was declared"
    count = {word: sum(c["verdict"] == word for c in claims) for word in VERDICTS}
    others = [f"{count[word]} {word.lower()}" for word in VERDICTS[1:] if count[word]]
    noun = "claim" if len(claims) == 1 else "claims"
    return ", ".join([f"{count[VERDICTS[0]]} of {len(claims)} {noun} reproduced", *others])


def median_of(summary: Mapping[str, Any], arm: str, metric: str) -> float | None:
    """Median over seeds of an arm's metric, None where a seed has no number for it."""
    values = summary["arms"][arm].get(metric, [])
    return None if not values or None in values else median(values)


def contrast(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The two arms a title speaks of: (against, arm) of the first claim, else the first and last arm."""
    arms = list(summary["arms"])
    for claim in summary["claims"]:
        return claim["against"], claim["arm"]
    return arms[0], arms[-1]


def setting(summary: Mapping[str, Any]) -> str:
    """Where the numbers come from: data, model, ranks, samples, steps, seeds."""
    design = summary["design"]
    ranks = "1 real rank" if design["world_size"] == 1 else f"{design['world_size']} real ranks"
    return (
        f"{design['data']}, {design['model']} · {ranks} {TIMES} {design['per_rank_batch']} samples"
        f"{_exceptions(summary)} · {design['steps']} steps · {len(design['seeds'])} seeds"
    )


def _exceptions(summary: Mapping[str, Any]) -> str:
    """Arms that ran on another number of ranks."""
    usual = summary["design"]["world_size"]
    others = [
        f"{arm}: {values['world_size'][0]} rank{'s' * (values['world_size'][0] > 1)}"
        for arm, values in summary["arms"].items()
        if values["world_size"][0] != usual
    ]
    return f" ({', '.join(others)})" if others else ""


def contrast_title(summary: Mapping[str, Any], metric: str, noun: str) -> str:
    """The two contrasted arms and their medians, in words."""
    worse, better = contrast(summary)
    samples = summary["design"]["per_rank_batch"]
    left, right = (value_words(metric, median_of(summary, arm, metric)) for arm in (worse, better))
    words = arm_words(worse)
    return (
        f"{words[0].upper()}{words[1:]} at {samples} samples a rank: {left} {noun}; "
        f"{arm_words(better)}: {right}"
    )


def axis_label(summary: Mapping[str, Any], metric: str) -> str:
    """The metric with its unit, and the split it was measured on where that is not the test set."""
    words = metric_words(metric)
    if summary["design"]["split"] == "validation":
        words = words.replace("test", "validation")
    unit = " (%)" if is_share(metric) else " (s)" if metric == "seconds" else ""
    return words[0].upper() + words[1:] + unit
