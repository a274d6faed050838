"""Whether a study came out worse than before: two summaries of it, paired by seed.

The decision that shaped the file: an arm is called worse only when the whole 95 % interval of its change lies beyond
the declared margin and survives Holm's correction over all that is looked at, so that a gate in CI is red when
something broke and not when seeds differ. What left the numbers, a seed that diverged or never arrived, is worse
without a test: it is counted, never averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from syncbn.compare import statistics
from syncbn.compare.claims import LEVEL, REPRODUCED
from syncbn.compare.directions import Metric, default_metric
from syncbn.compare.launches import ClaimChange, lost_claims, refuse_unlike, shared_seeds
from syncbn.compare.reading import Summary
from syncbn.compare.statistics import Floats, Interval
from syncbn.compare.summaries import by_seed
from syncbn.errors import UsageError

WORSE, BETTER, SAME, CANNOT_TELL = "WORSE", "BETTER", "SAME", "CANNOT TELL"


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
        return sign * statistics.paired_differences(self.new, self.base)


def compare(
    base: Summary, new: Summary, metrics: Sequence[Metric] = (), margin: float = 0.0
) -> Regression:
    """How `new` differs from `base`, by arm and metric; without `metrics`, in `default_metric`.

    Args:
        base: summary of an earlier launch of the study.
        new: summary of a later one.
        metrics: what to compare.
        margin: a change for the worse up to this much is accepted; in the metric's unit, errors are fractions.

    Raises:
        UsageError: other studies or designs, fewer than two seeds in common, or a metric that was not measured.
    """
    refuse_unlike(base, new)
    seeds = shared_seeds(base, new)
    wanted = metrics or (default_metric(base),)
    found = [pairs for metric in wanted for pairs in _all_pairs(base, new, metric, seeds)]
    return Regression(
        study=base["study"],
        margin=margin,
        seeds=seeds,
        changes=_judge(found, margin),
        claims=lost_claims(base, new),
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


def _judge(found: Sequence[_Pairs], margin: float) -> list[Change]:
    """Verdicts; a change for the better pays Holm's correction like one for the worse."""
    worse = statistics.holm([statistics.p_below(-pairs.worsening, -margin) for pairs in found])
    better = statistics.holm([statistics.p_below(pairs.worsening, -margin) for pairs in found])
    return [_change(*each, margin) for each in zip(found, worse, better, strict=True)]


def _change(pairs: _Pairs, p_worse: float, p_better: float, margin: float) -> Change:
    effect = statistics.effect(statistics.paired_differences(pairs.new, pairs.base))
    worsening = statistics.effect(pairs.worsening).interval
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
