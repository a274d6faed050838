"""Whether to synchronise, over which ranks, at what cost: a pure function of what a study measured.

Two numbers are declared beforehand: the smallest difference in error that matters (`margin`), and how much longer a
step may take for each point of error saved (`point_worth`). Where the task decides by something else than a share, a
point is 1 % of the largest median among the arms, in the measure's unit. Everything is judged by whole 95 % intervals
against these; where an interval straddles its bound, the advice is that these seeds cannot tell.

Two short studies give the numbers, as overrides of conf/study/advise.yaml. Errors are measured on virtual ranks, which
any machine can run at any world size; costs on real ranks, and only where there is a core for each.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from syncbn.compare.measure import Measure, decided_by
from syncbn.compare.statistics import effects
from syncbn.compare.statistics.effects import Floats, Interval
from syncbn.compare.study.repeat import hydra_value
from syncbn.compare.study.summary import Summary, values_of
from syncbn.errors import UsageError

SYNCHRONISE, DO_NOT, CANNOT_TELL = "SYNCHRONISE", "DO NOT SYNCHRONISE", "CANNOT TELL"

AS_GOOD, WORSE, UNDECIDED = "as good as the best", "worse than the best", "cannot tell"

_COSTS = ("step_ms", "seconds")
"""What a step's time is read from, the first that both arms have."""


@dataclass(frozen=True)
class PairedEffect:
    """A paired effect over seeds: median, 95 % interval, number of seeds."""

    median: float
    interval: Interval
    n: int


@dataclass(frozen=True)
class Group:
    """Synchronising over groups of `size` ranks; 1 is local, the world size is all ranks."""

    arm: str
    size: int
    error: float
    """Median over seeds of the test error, or of what else the task decides by."""
    excess: PairedEffect
    """How much worse it is than the group with the best median; in the measure's unit, as gain and margin are."""
    standing: str
    """`AS_GOOD`: less than the margin above every other. `WORSE`: more than the margin above another."""


@dataclass(frozen=True)
class Cost:
    """How many times as long a step takes as a local one."""

    ratio: PairedEffect
    metric: str
    worth: float
    """As long as it may take, by the error that it saves."""
    too_much: bool
    """Whether the measured ratio, its median, is above that."""
    sure: bool
    """Whether its whole interval lies on one side of what the whole interval of the gain is worth."""


@dataclass(frozen=True)
class Advice:
    """What to do, and what it rests on."""

    verdict: str
    group: Group
    """The one that is recommended: local, or `synchronised`; also where the seeds cannot tell."""
    group_is_sure: bool
    """Whether it is shown to be as good as every other."""
    groups: list[Group]
    """All, by size."""
    synchronised: Group
    """The best way to synchronise: the smallest group as good as every other, else the one with the smallest median."""
    gain: PairedEffect
    """What this is better by: local - synchronised, the other way round where more is better."""
    cost: Cost | None
    """None where it was not measured."""
    margin: float
    point_worth: float
    point: float
    """A point in the measure's unit: 0.01 of a share."""
    measure: Measure
    """What is compared."""


def advice(
    summary: Summary,
    margin: float | None = None,
    point_worth: float = 0.10,
    cost: Summary | None = None,
) -> Advice:
    """What `summary` says of synchronising.

    Args:
        summary: of a study with the arm `local` and at least one that synchronises.
        margin: the smallest difference that matters, in the unit of what the task decides by; None means a point.
        point_worth: how much longer a step may take for each point of error saved: 0.1 is a tenth.
        cost: of a study on real ranks with the same arms; None where the cost is not known.

    Raises:
        UsageError: arms are missing, or fewer than two seeds have a number in all of them.
    """
    measure = decided_by(summary)
    points = points_per_unit(summary)
    margin = 1 / points if margin is None else margin
    groups = _groups(summary, margin)
    local, others = groups[0], groups[1:]
    good = [group for group in groups if group.standing == AS_GOOD]
    best = min(others, key=lambda group: measure.sign * group.error)
    chosen = next((group for group in good if group.size > 1), best)
    gain = _paired(summary, local.arm, chosen.arm)
    bill = None if cost is None else _cost(cost, chosen.arm, gain, point_worth * points)
    verdict = _verdict(local, gain, bill, margin)
    recommended = local if verdict == DO_NOT else chosen
    return Advice(
        verdict=verdict,
        group=recommended,
        group_is_sure=recommended in good,
        groups=groups,
        synchronised=chosen,
        gain=gain,
        cost=bill,
        margin=margin,
        point_worth=point_worth,
        point=1 / points,
        measure=measure,
    )


def points_per_unit(summary: Summary) -> float:
    """How many points make a unit of what the task decides by: 100 of a share."""
    measure = decided_by(summary)
    if measure.is_share:
        return 100.0
    medians = [abs(float(np.median(_errors(summary, arm)))) for arm in arms_by_size(summary)]
    return 100 / (max(medians) or 1.0)


def _verdict(local: Group, gain: PairedEffect, bill: Cost | None, margin: float) -> str:
    if local.standing == AS_GOOD:
        return DO_NOT
    if gain.interval.low <= margin:
        return CANNOT_TELL
    return DO_NOT if bill is not None and bill.too_much else SYNCHRONISE


def _groups(summary: Summary, margin: float) -> list[Group]:
    """All groups by size, each compared with every other."""
    sizes = arms_by_size(summary)
    sign = decided_by(summary).sign
    errors = {arm: sign * _errors(summary, arm) for arm in sizes}
    medians = {arm: float(np.median(values)) for arm, values in errors.items()}
    best = min(medians, key=medians.__getitem__)
    return [
        Group(
            arm=arm,
            size=size,
            error=sign * medians[arm],
            excess=_effect(errors[arm] - errors[best]),
            standing=_standing([errors[arm] - errors[o] for o in sizes if o != arm], margin),
        )
        for arm, size in sizes.items()
    ]


def _standing(excesses: Sequence[Floats], margin: float) -> str:
    """Where an arm stands by its excesses over each of the others, one a seed."""
    intervals = [_effect(excess).interval for excess in excesses]
    if all(interval.high < margin for interval in intervals):
        return AS_GOOD
    return WORSE if any(interval.low > margin for interval in intervals) else UNDECIDED


def arms_by_size(summary: Summary) -> dict[str, int]:
    """The arms that differ in nothing but how many ranks share statistics, with that number, smallest first.

    Raises:
        UsageError: `local` is not among them, or nothing that synchronises.
    """
    sizes = {arm: _size(summary, arm) for arm in summary["arms"]}
    known = {arm: size for arm, size in sizes.items() if size is not None}
    ordered = dict(sorted(known.items(), key=lambda item: item[1]))
    if list(ordered.values())[:1] != [1] or len(ordered) < 2:
        raise UsageError(
            f"study {summary['study']} has the arms {', '.join(summary['arms'])}: advice needs local, and one of sync "
            "and group_K, which synchronises over groups of K ranks"
        )
    return ordered


def _size(summary: Summary, arm: str) -> int | None:
    """How many ranks share statistics in `arm`, by its name; None where that is not what it differs in."""
    design = summary["design"]
    if arm == "sync_group":
        together = (design.get("normalisation_batch") or {}).get(arm)
        return None if together is None else together // design["per_rank_batch"]
    group = re.fullmatch(r"(?:sync_)?group_(\d+)", arm)
    return int(group[1]) if group else {"local": 1, "sync": design["world_size"]}.get(arm)


def _errors(summary: Summary, arm: str) -> Floats:
    """The arm's test errors over the seeds, or what else the task decides by.

    Raises:
        UsageError: one of them is missing, or there are fewer than two.
    """
    metric = decided_by(summary).name
    values = values_of(summary, arm, metric)
    if len(values) < 2 or None in values:
        raise UsageError(
            f"study {summary['study']}: {metric} of arm {arm!r} is {values}: advice needs a number for each of at "
            "least two seeds, better eight"
        )
    return np.array(values, dtype=np.float64)


def _paired(summary: Summary, arm: str, against: str) -> PairedEffect:
    sign = decided_by(summary).sign
    return _effect(sign * (_errors(summary, arm) - _errors(summary, against)))


def _effect(values: Floats) -> PairedEffect:
    found = effects.effect(values)
    return PairedEffect(found.median, found.interval, found.n)


def _cost(summary: Summary, arm: str, gain: PairedEffect, unit_worth: float) -> Cost | None:
    """The time of a step in `arm` over that of a local one; None where `summary` has no number for it."""
    for metric in _COSTS:
        times = [values_of(summary, name, metric) for name in (arm, "local")]
        if all(values and None not in values for values in times):
            logs = effects.effect(effects.paired_log_ratios(*times))  # pyright: ignore
            return _cost_of(metric, logs, gain, unit_worth)
    return None


def _cost_of(
    metric: str, logs: effects.Effect, gain: PairedEffect, unit_worth: float
) -> Cost | None:
    if not math.isfinite(logs.median):
        return None
    with np.errstate(over="ignore"):
        low, middle, high = np.exp([logs.interval.low, logs.median, logs.interval.high])
    ends = (gain.interval.low, gain.median, gain.interval.high)
    least, worth, most = (1 + unit_worth * max(end, 0.0) for end in ends)
    return Cost(
        ratio=PairedEffect(float(middle), Interval(float(low), float(high)), logs.n),
        metric=metric,
        worth=worth,
        too_much=bool(middle > worth),
        sure=bool(low > most or high <= least),
    )


COST_STEPS = 120
COST_SEEDS = [0, 1, 2, 3, 4, 5]


def group_sizes(world_size: int) -> list[int]:
    """Sizes of groups between one rank and all: the proper divisors of `world_size`."""
    return [size for size in range(2, world_size) if world_size % size == 0]


def group_arm(size: int) -> str:
    """The name of the arm that synchronises over groups of `size` ranks."""
    return f"group_{size}"


def error_study(settings: Sequence[str], world_size: int) -> list[str]:
    """Overrides of the study of errors: `settings`, and an arm for each size of group between one rank and all."""
    return ["study=advise", *settings, *_group_arms(group_sizes(world_size))]


def cost_study(settings: Sequence[str], name: str, sizes: Sequence[int]) -> list[str]:
    """Overrides of the study of cost: the same on real ranks, briefly, with clocks on the exchange.

    Args:
        settings: the user's own.
        name: of the study of errors; this one is called `<name>-cost`.
        sizes: groups that are timed beside `local` and `sync`.
    """
    return [
        "study=advise",
        *settings,
        *_group_arms(sizes),
        f"name={cost_name(name)}",
        "train.virtual=false",
        f"train.steps={COST_STEPS}",
        "train.eval_every=0",
        "probe.names=[exchange]",
        f"study.seeds={hydra_value(COST_SEEDS)}",
        "study.primary_metric=step_ms",
        "study.question='What does synchronising cost this network on this machine?'",
    ]


def cost_name(name: str) -> str:
    """What the study of cost is called that belongs to the study of errors `name`."""
    return f"{name}-cost"


def _group_arms(sizes: Sequence[int]) -> list[str]:
    return [
        f"+study.arms.{group_arm(k)}={hydra_value(['norm=sync_group', f'norm.group_size={k}'])}"
        for k in sizes
    ]
