"""Whether a study came out worse than before: the summaries of two launches of it, paired by seed.

An arm is called worse only where the whole 95 % interval of its change lies beyond the declared margin and survives
Holm's correction over all that is compared, so that a gate in CI is red when something broke and not when seeds differ.
A seed that diverged or lost its number makes its arm worse without a test: it is counted, never averaged. Two launches
must share their design; code, versions and settings of the optimiser may differ, because those are what is compared.
The direction of a metric is known by name where it is beyond doubt, and has to be given for any other: a gate that
guesses it wrong is green when something broke.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from syncbn.compare.measure import Measure, decided_by, primary_of, shown
from syncbn.compare.statistics import effects, significance
from syncbn.compare.statistics.claims import INCONCLUSIVE, LEVEL, REPRODUCED
from syncbn.compare.statistics.effects import Floats, Interval
from syncbn.compare.study.summary import Summary, by_seed
from syncbn.errors import UsageError

WORSE, BETTER, SAME, CANNOT_TELL = "WORSE", "BETTER", "SAME", "CANNOT TELL"
_LEAST_SEEDS = 2
"""Fewer pairs bound no interval."""

_SAME_IN_BOTH = (
    "data",
    "model",
    "world_size",
    "per_rank_batch",
    "steps",
    "split",
    "virtual",
    "tier",
    "grid",
)
"""What of a design decides whether two launches can be compared."""

_DECLARED = ("arm", "against", "beyond", "along", "metric", "kind", "threshold", "range", "scale")
_LOWER_IS_BETTER = ("error", "loss", "seconds", "_ms", "_bytes", "diverged", "steps_to_target")
_HIGHER_IS_BETTER = ("accuracy", "cells_trained")
_TIMES = ("seconds", "_ms")


@dataclass(frozen=True)
class Metric:
    """What is compared, and whether lower values of it are better."""

    name: str
    lower_is_better: bool = True


def metric_of(text: str, summary: Summary | None = None) -> Metric:
    """The metric that `text` names: `test_error`, or `name:lower` and `name:higher`, which say what is better.

    Without that, the way of what the study of `summary` is decided by is known, and of others by their names.

    Raises:
        UsageError: no direction is given, and none is known.
    """
    name, _, direction = text.partition(":")
    if direction:
        if direction not in ("lower", "higher"):
            raise UsageError(f"metric={text!r} is not allowed: NAME:lower or NAME:higher")
        return Metric(name, direction == "lower")
    decides = None if summary is None else decided_by(summary)
    if decides is not None and name in (decides.name, decides.name.replace("test_", "best_", 1)):
        return Metric(name, decides.lower_is_better)
    if name.endswith(_HIGHER_IS_BETTER):
        return Metric(name, lower_is_better=False)
    if name.startswith("steps_to_target") or name.endswith(_LOWER_IS_BETTER):
        return Metric(name)
    raise UsageError(
        f"metric={name!r}: say which way is better, {name}:lower or {name}:higher; it goes without saying for errors, "
        "losses, times, bytes, accuracies"
    )


def default_metric(summary: Summary) -> Metric:
    """What the study is about, where that has a better and a worse; else, and for times, what its task decides by.

    Times differ from machine to machine, and with what else runs there.
    """
    primary, decides = primary_of(summary), decided_by(summary)
    try:
        metric = metric_of(primary, summary)
    except UsageError:
        return Metric(decides.name, decides.lower_is_better)
    if primary.endswith(_TIMES):
        return Metric(decides.name, decides.lower_is_better)
    return metric


@dataclass(frozen=True)
class ClaimChange:
    """A claim that was reproduced, and no longer is."""

    name: str
    verdict: str
    counts: bool
    """Whether it makes the study worse."""
    note: str


@dataclass(frozen=True)
class Change:
    """What became of one metric of one arm."""

    arm: str
    metric: Metric
    verdict: str
    base: float | None
    """Median over the seeds that have a number in both."""
    new: float | None
    effect: float
    """Median over seeds of `new - base`."""
    interval: Interval
    """95 %, of the same."""
    n: int
    """Seeds that have a number in both."""
    p_holm: float
    """Of "it did not get worse", after Holm's correction over all arms and metrics."""
    note: str
    measure: Measure
    """How the metric is shown."""


@dataclass(frozen=True)
class Regression:
    """How a study changed from one launch to another."""

    study: str
    margin: float
    seeds: list[int]
    """Those that both have, in the order of the base."""
    changes: list[Change]
    claims: list[ClaimChange]
    """Those that were reproduced and no longer are."""

    @property
    def worse(self) -> list[str]:
        """What got worse, in words; empty where nothing did."""
        arms = [f"{c.metric.name} of arm {c.arm!r}" for c in self.changes if c.verdict == WORSE]
        claims = [
            f"claim {c.name!r} ({REPRODUCED} -> {c.verdict})" for c in self.claims if c.counts
        ]
        return [*arms, *claims]


@dataclass(frozen=True)
class _Pairs:
    """One metric of one arm, seed by seed."""

    arm: str
    metric: Metric
    base: list[float]
    new: list[float]
    lost: list[int]
    """Seeds that had a number, or converged, and no longer do."""
    found: list[int]
    """Seeds that have a number now and had none."""
    never: list[int]
    """Seeds without a number in either."""

    @property
    def worsening(self) -> Floats:
        """Positive where the new value is worse."""
        sign = 1 if self.metric.lower_is_better else -1
        return sign * effects.paired_differences(self.new, self.base)


def compare(
    base: Summary, new: Summary, metrics: Sequence[Metric] = (), margin: float = 0.0
) -> Regression:
    """How `new` differs from `base`, by arm and metric; without `metrics`, in `default_metric`.

    Args:
        base: summary of an earlier launch of the study.
        new: summary of a later one.
        metrics: what to compare.
        margin: a change for the worse up to this much is accepted, in the metric's unit; shares are fractions.

    Raises:
        UsageError: other studies or designs, fewer than two seeds in common, or a metric that was not measured.
    """
    _refuse_unlike(base, new)
    seeds = _shared_seeds(base, new)
    wanted = metrics or (default_metric(base),)
    found = [pairs for metric in wanted for pairs in _all_pairs(base, new, metric, seeds)]
    return Regression(
        study=base["study"],
        margin=margin,
        seeds=seeds,
        changes=_judge(found, margin, base),
        claims=_lost_claims(base, new),
    )


def _all_pairs(base: Summary, new: Summary, metric: Metric, seeds: Sequence[int]) -> list[_Pairs]:
    """The metric of every arm that has it."""
    have = [arm for arm, values in base["arms"].items() if metric.name in values]
    if not have:
        known = ", ".join(dict.fromkeys(m for values in base["arms"].values() for m in values))
        raise UsageError(f"metric={metric.name!r} is not measured in {base['study']}: {known}")
    missing = [arm for arm in have if metric.name not in new["arms"][arm]]
    if missing:
        raise UsageError(f"metric={metric.name!r} of arms {missing} is missing in the new launch")
    return [_pairs(base, new, arm, metric, seeds) for arm in have]


def _pairs(base: Summary, new: Summary, arm: str, metric: Metric, seeds: Sequence[int]) -> _Pairs:
    old, late = by_seed(base, arm, metric.name), by_seed(new, arm, metric.name)
    was, now = by_seed(base, arm, "diverged"), by_seed(new, arm, "diverged")
    both = [seed for seed in seeds if old[seed] is not None and late[seed] is not None]
    return _Pairs(
        arm=arm,
        metric=metric,
        base=_numbers(old, both),
        new=_numbers(late, both),
        lost=[
            seed
            for seed in seeds
            if (late[seed] is None and old[seed] is not None)
            or (now.get(seed) and not was.get(seed))
        ],
        found=[seed for seed in seeds if old[seed] is None and late[seed] is not None],
        never=[seed for seed in seeds if old[seed] is None and late[seed] is None],
    )


def _numbers(values: Mapping[int, float | None], seeds: Sequence[int]) -> list[float]:
    return [value for seed in seeds if (value := values[seed]) is not None]


def _judge(found: Sequence[_Pairs], margin: float, base: Summary) -> list[Change]:
    """Verdicts; changes for the better are corrected by Holm's method like those for the worse."""
    worse = significance.holm([significance.p_below(-pairs.worsening, -margin) for pairs in found])
    better = significance.holm([significance.p_below(pairs.worsening, -margin) for pairs in found])
    return [
        _change(pairs, p_worse, p_better, margin, shown(base, pairs.metric.name))
        for pairs, p_worse, p_better in zip(found, worse, better, strict=True)
    ]


def _change(
    pairs: _Pairs, p_worse: float, p_better: float, margin: float, measure: Measure
) -> Change:
    effect = effects.effect(effects.paired_differences(pairs.new, pairs.base))
    worsening = effects.effect(pairs.worsening).interval
    verdict, note = _decide(worsening, p_worse, p_better, margin)
    if pairs.lost:
        verdict, note = WORSE, f"seeds {pairs.lost} diverged or have no number any more"
    return Change(
        arm=pairs.arm,
        metric=pairs.metric,
        verdict=verdict,
        base=median(pairs.base) if pairs.base else None,
        new=median(pairs.new) if pairs.new else None,
        effect=effect.median,
        interval=effect.interval,
        n=effect.n,
        p_holm=p_worse,
        note="; ".join(filter(None, [note, _left_out(pairs)])),
        measure=measure,
    )


def _decide(worsening: Interval, p_worse: float, p_better: float, margin: float) -> tuple[str, str]:
    """The verdict by where the interval of the change for the worse lies, and a note where Holm overrules it."""
    if worsening.low > margin:
        return (WORSE, "") if p_worse <= LEVEL else (CANNOT_TELL, _holm_words(p_worse))
    if worsening.high < -margin:
        return (BETTER, "") if p_better <= LEVEL else (CANNOT_TELL, _holm_words(p_better))
    if -margin <= worsening.low and worsening.high <= margin:
        return SAME, ""
    return CANNOT_TELL, ""


def _holm_words(p: float) -> str:
    return f"p = {p:.3f} after Holm's correction"


def _left_out(pairs: _Pairs) -> str:
    """Seeds that have no number to compare, which no average may hide."""
    found = f"seeds {pairs.found} have a number now and had none" if pairs.found else ""
    never = f"seeds {pairs.never} have no number in either" if pairs.never else ""
    return "; ".join(filter(None, [found, never]))


def _refuse_unlike(base: Summary, new: Summary) -> None:
    """Refuse two summaries that are not launches of one study.

    A key that only one of them has is left alone: an older version may not have written it.

    Raises:
        UsageError: another study, design or set of arms; names the key and both values.
    """
    _refuse("study", base["study"], new["study"])
    for key in _SAME_IN_BOTH:
        if key in base["design"] and key in new["design"]:
            _refuse(f"design.{key}", base["design"][key], new["design"][key])
    _refuse("arms", sorted(base["arms"]), sorted(new["arms"]))


def _refuse(key: str, base: Any, new: Any) -> None:
    if base != new:
        raise UsageError(
            f"{key} is {base!r} in the base and {new!r} in the new launch: not one study"
        )


def _shared_seeds(base: Summary, new: Summary) -> list[int]:
    """The seeds that both have, in the order of the base.

    Raises:
        UsageError: they are fewer than two.
    """
    seeds = [seed for seed in base["design"]["seeds"] if seed in new["design"]["seeds"]]
    if len(seeds) < _LEAST_SEEDS:
        raise UsageError(
            f"the launches share the seeds {seeds}, of {base['design']['seeds']} and {new['design']['seeds']}: at "
            f"least {_LEAST_SEEDS} are needed, and 6 to see more than the largest changes"
        )
    return seeds


def _lost_claims(base: Summary, new: Summary) -> list[ClaimChange]:
    """The claims of `base` that were reproduced and are not in `new`.

    One that is merely undecided now, over fewer seeds than before, does not count as worse.
    """
    now = {claim["name"]: claim for claim in new["claims"]}
    fewer = not set(base["design"]["seeds"]) <= set(new["design"]["seeds"])
    reproduced = [claim for claim in base["claims"] if claim["verdict"] == REPRODUCED]
    return [
        _claim_change(claim, now.get(claim["name"]), fewer)
        for claim in reproduced
        if now.get(claim["name"], {}).get("verdict") != REPRODUCED
    ]


def _claim_change(
    was: Mapping[str, Any], now: Mapping[str, Any] | None, fewer: bool
) -> ClaimChange:
    if now is None:
        return ClaimChange(was["name"], "not declared", True, "the new launch does not claim it")
    excused = fewer and now["verdict"] == INCONCLUSIVE
    notes = [
        f"{key} was {was[key]!r}, is {now[key]!r}"
        for key in _DECLARED
        if key in was and key in now and was[key] != now[key]
    ]
    notes += ["over fewer seeds: not counted"] if excused else []
    return ClaimChange(was["name"], now["verdict"], not excused, "; ".join(notes))


def differences(base: Summary, new: Summary) -> list[str]:
    """What else differs, a line each: revision, versions, what the search chose, the target."""
    pairs = [("revision", base.get("git"), new.get("git"))]
    old, late = base.get("versions", {}), new.get("versions", {})
    pairs += [(name, old.get(name), late.get(name)) for name in dict.fromkeys([*old, *late])]
    pairs += [("tuned", _tuned(base), _tuned(new))]
    pairs += [("target", base["design"].get("target"), new["design"].get("target"))]
    return [f"{name}: {was} -> {now}" for name, was, now in pairs if was != now]


def _tuned(summary: Summary) -> dict[str, Any]:
    """Arm to what the search chose for it."""
    searched = summary["design"].get("tuned") or {}
    return {
        arm: {key: value for key, value in chosen.items() if key not in ("errors", "at_an_end")}
        for arm, chosen in searched.items()
    }
