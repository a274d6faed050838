"""An advice in words, and as values for JSON."""

from dataclasses import asdict
from typing import Any

from syncbn.compare.advice import DO_NOT, SYNCHRONISE, WORSE, Advice, Cost, Group, PairedEffect
from syncbn.compare.report.words.numbers import TIMES, number, percent, value_words
from syncbn.compare.report.words.study import setting
from syncbn.compare.report.words.text import aligned
from syncbn.compare.study.summary import Summary, finite

NOT_MEASURED = (
    "not measured: left out by --no-cost, or this machine has fewer cores than ranks. `syncbn compare study=cost` "
    "measures it where ranks have cores; docs/performance.md has the layer's own times"
)


def text(advice: Advice, summary: Summary) -> str:
    """The answer first, then what it rests on, then what it does not say."""
    return "\n".join(
        [
            f"{advice.verdict}{_over(advice, summary)}",
            "",
            *(f"  {name:<9} {words}" for name, words in _reasons(advice, summary)),
            "",
            aligned(header(advice), [_row(advice, group, summary) for group in advice.groups]),
            "",
            *(f"  * {line}" for line in caveats(advice, summary)),
        ]
    )


def header(advice: Advice) -> tuple[str, ...]:
    """The head of the table of groups."""
    beside = "above the best" if advice.measure.lower_is_better else "below the best"
    return ("ranks together", "samples", advice.measure.words, beside, "95 % interval", "so it is")


def _over(advice: Advice, summary: Summary) -> str:
    """The ranks to synchronise over, after the verdict."""
    if advice.verdict == DO_NOT:
        return ""
    if advice.verdict != SYNCHRONISE:
        return f": {advice.groups[0].arm} or {advice.group.arm}"
    doubt = "" if advice.group_is_sure else "; which group is best, these seeds cannot tell"
    return f" over {ranks_words(advice.group, summary)}{doubt}"


def ranks_words(group: Group, summary: Summary) -> str:
    """A group of ranks: `groups of 4 ranks (8 samples)`."""
    samples = f"({group.size * summary['design']['per_rank_batch']} samples)"
    if group.size == 1:
        return f"each rank alone {samples}"
    if group.size == summary["design"]["world_size"]:
        return f"all {group.size} ranks {samples}"
    return f"groups of {group.size} ranks {samples}"


def _reasons(advice: Advice, summary: Summary) -> list[tuple[str, str]]:
    return [
        ("why", why(advice)),
        ("error" if advice.measure.is_share else "measure", _error_words(advice, summary)),
        ("cost", _cost_words(advice.cost)),
        ("how sure", _sure_words(advice)),
        ("from", setting(summary)),
    ]


def why(advice: Advice) -> str:
    """The reason for the verdict, in a sentence."""
    matter = f"the margin of {amount(advice, advice.margin)}"
    saves = "saves" if advice.measure.lower_is_better else "adds"
    if advice.verdict == SYNCHRONISE:
        return f"it {saves} more than {matter}{_beside_all(advice)}"
    if advice.verdict != DO_NOT:
        return f"these seeds leave open whether it {saves} more or less than {matter}"
    if advice.cost is not None and advice.gain.interval.low > advice.margin:
        worth = f"worth {TIMES}{number(advice.cost.worth)} the time of a step"
        return f"it {saves} {amount(advice, advice.gain.median)}, {worth}, and costs more than that"
    return f"each rank alone does as well as any group, within {matter}"


def _beside_all(advice: Advice) -> str:
    """How the recommended group stands to all ranks together, where it is smaller."""
    everybody = advice.groups[-1]
    if everybody.size == advice.group.size or not advice.group_is_sure:
        return ""
    if everybody.standing == WORSE:
        return ", and all ranks together do worse"
    return ", and no larger group saves as much again"


def _error_words(advice: Advice, summary: Summary) -> str:
    """Both errors, and their difference."""
    local = advice.groups[0]
    best = advice.synchronised
    measure = advice.measure
    done = "saved" if measure.lower_is_better else "more"
    saved = f"{amount(advice, advice.gain.median)} {done} ({_interval(advice, advice.gain)})"
    one, other = (value_words(measure, group.error) for group in (local, best))
    what = "" if measure.is_share else f"{measure.words} "
    return f"{what}{one} local, {other} over {ranks_words(best, summary)}: {saved}"


def _cost_words(cost: Cost | None) -> str:
    if cost is None:
        return NOT_MEASURED
    what = "a step" if cost.metric == "step_ms" else "a whole run"
    ratio = f"{what} takes {TIMES}{number(cost.ratio.median)} as long as a local one"
    ends = [finite(end) for end in (cost.ratio.interval.low, cost.ratio.interval.high)]
    if None not in ends:
        ratio += f" ({TIMES}{number(ends[0])} to {TIMES}{number(ends[1])})"
    doubt = "" if cost.sure else "; these seeds leave open which of the two is more"
    return f"{ratio}; by its error it may take {TIMES}{number(cost.worth)}{doubt}"


def _sure_words(advice: Advice) -> str:
    point = (
        "" if advice.measure.is_share else f" ({number(advice.point)}, 1 % of the largest median)"
    )
    return (
        f"{advice.gain.n} seeds, whole 95 % intervals; declared: a margin of {amount(advice, advice.margin)}, and "
        f"that a point{point} is worth {100 * advice.point_worth:g} % of a step's time"
    )


def caveats(advice: Advice, summary: Summary) -> list[str]:
    """What the advice does not say."""
    design = summary["design"]
    lines = [
        f"It holds for {design['steps']} steps of this network on these images; another length may say otherwise."
    ]
    if design.get("virtual"):
        lines.append("Errors are of virtual ranks: one process computes what real ones would.")
    if not design.get("tuned"):
        lines.append("All arms ran with one learning rate, which nobody tuned for any of them.")
    if advice.gain.n < 6:
        lines.append(f"{advice.gain.n} seeds are few: with 6 or more, smaller differences show.")
    return lines


def _row(advice: Advice, group: Group, summary: Summary) -> tuple[str, ...]:
    best = group.excess.median == 0 and group.excess.interval.low == group.excess.interval.high
    return (
        str(group.size),
        str(group.size * summary["design"]["per_rank_batch"]),
        value_words(advice.measure, group.error),
        "" if best else amount(advice, group.excess.median),
        "" if best else _interval(advice, group.excess),
        group.standing,
    )


def amount(advice: Advice, difference: float) -> str:
    """A difference between two values: in points of a share, else in the measure's own unit."""
    if advice.measure.is_share:
        return points(difference)
    return f"{number(difference)} {advice.measure.unit}".rstrip()


def points(share: float) -> str:
    """A difference of errors in points: `1 point`, `50.2 points`."""
    text = percent(share).removesuffix(".0")
    return f"{text} point" if text == "1" else f"{text} points"


def _interval(advice: Advice, effect: PairedEffect) -> str:
    low, high = finite(effect.interval.low), finite(effect.interval.high)
    if low is None or high is None:
        return "no interval"
    shown = percent if advice.measure.is_share else number
    return f"{shown(low)} to {shown(high)}"


def to_dict(advice: Advice, summary: Summary) -> dict[str, Any]:
    """The advice as values that JSON has; what is not finite is None."""
    return {
        "verdict": advice.verdict,
        "why": why(advice),
        "caveats": caveats(advice, summary),
        **finite(asdict(advice)),
    }
