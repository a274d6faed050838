"""Range checks on a study: its arms, seeds, grid, search, target and claims.

A claim that could not be judged, or whose threshold means nothing on its scale, is refused before the study runs,
because a claim that is changed afterwards is another claim.
"""

import math
from collections.abc import Iterator

from syncbn.config import KINDS, SCALES, ClaimConfig, StudyConfig, TargetConfig, TuneConfig


def complaints(study: StudyConfig, classifies: bool = True) -> Iterator[str]:
    """What is wrong with `study`, a line each, nothing where it is sound; names of arms are checked elsewhere.

    Where its task `classifies`, a target is a fraction.
    """
    if not study.arms:
        yield "study.arms is empty: a study compares at least two arms"
    yield from _about_seeds("study.seeds", study.seeds)
    for tier in [*study.tiers, study.tier, *(t for claim in study.claims for t in claim.tiers)]:
        if tier not in ("fast", "full"):
            yield f"study: tier {tier!r} is not allowed: one of fast, full"
    for key, values in study.grid.items():
        if not values or len(set(values)) != len(values):
            yield f"study.grid.{key}={values} is not allowed: distinct numbers"
    if study.tune is not None:
        yield from _about_search(study.tune)
        if study.grid:
            yield "study.tune and study.grid exclude each other: the grid shows every value"
    if study.target is not None:
        yield from _about_target(study.target, study, classifies)
    for claim in study.claims:
        yield from _about_claim(claim, study)


def _about_seeds(key: str, seeds: list[int]) -> Iterator[str]:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        yield f"{key}={seeds} is not allowed: distinct whole numbers >= 0"


def _about_search(tune: TuneConfig) -> Iterator[str]:
    yield from _about_seeds("study.tune.seeds", tune.seeds)
    if len(tune.values) < 2 or len(set(tune.values)) != len(tune.values):
        yield f"study.tune.values={tune.values} is not allowed: at least two distinct numbers"
    if not 0 < tune.validation < 1:
        yield (
            f"study.tune.validation={tune.validation} is not allowed: a share between 0 and 1, for the search must "
            "not see the test set"
        )


def _about_target(target: TargetConfig, study: StudyConfig, classifies: bool) -> Iterator[str]:
    if (target.error is None) == (target.arm is None):
        yield "study.target needs either error, a fraction, or arm, whose best error is the target"
    if target.error is not None and not math.isfinite(target.error):
        yield f"study.target.error={target.error} is not allowed: a finite number"
    if classifies and target.error is not None and not 0 <= target.error <= 1:
        yield f"study.target.error={target.error} is not allowed: a fraction from 0 to 1"
    if target.arm is not None and target.arm not in study.arms:
        yield f"study.target.arm={target.arm!r} is none of {', '.join(study.arms)}"
    if study.grid and target.error is None:
        yield "study.target.error is needed with study.grid: a cell counts as trained at that error"


def _about_claim(claim: ClaimConfig, study: StudyConfig) -> Iterator[str]:
    named = [claim.arm, claim.against, *claim.beyond, *claim.along]
    for arm in [name for name in named if name]:
        if arm not in study.arms:
            yield f"claim {claim.name!r} names arm {arm!r}; arms: {', '.join(study.arms)}"
    if claim.kind not in KINDS:
        yield f"claim {claim.name!r}: kind={claim.kind!r} is not allowed: one of {', '.join(KINDS)}"
    if claim.scale not in SCALES:
        yield f"claim {claim.name!r}: scale={claim.scale!r} is not allowed: one of {', '.join(SCALES)}"
    yield from (f"claim {claim.name!r}: {complaint}" for complaint in _about_shape(claim))
    yield from (f"claim {claim.name!r}: {complaint}" for complaint in _about_bounds(claim))


def _about_shape(claim: ClaimConfig) -> Iterator[str]:
    """Which arms a claim needs."""
    trend = claim.kind in ("increasing", "decreasing")
    if trend != bool(claim.along):
        yield "increasing and decreasing compare arms in order, given as `along`; no other kind does"
    if claim.along and len(claim.along) < 3:
        yield f"along={claim.along} is not allowed: at least three arms"
    if not claim.along and not claim.arm:
        yield "arm is missing: the claim names none"
    if claim.beyond and (len(claim.beyond) != 2 or claim.against is None):
        yield "beyond takes two arms, whose difference is taken from arm - against"
    if claim.scale == "share" and (claim.against is None or claim.beyond):
        yield "scale=share compares arm with against, at each look"
    if claim.in_every_seed and claim.kind not in ("less", "greater"):
        yield f"in_every_seed is not allowed with kind={claim.kind}: less or greater"


def _about_bounds(claim: ClaimConfig) -> Iterator[str]:
    """What threshold or range means something for a claim of its kind and scale."""
    if (claim.kind == "within") != bool(claim.range):
        yield "within needs a range of two ends, and no other kind takes one"
    ends = claim.range
    if ends and (len(ends) != 2 or not ends[0] < ends[1] or not all(map(math.isfinite, ends))):
        yield f"range={ends} is not allowed: two finite numbers, the smaller first"
    ratio, margin = claim.scale == "ratio", claim.kind == "equivalent"
    if claim.kind in ("within", "increasing", "decreasing") or (
        ratio and claim.kind == "different"
    ):
        return
    least = float(ratio and margin) if ratio or margin else -math.inf
    if not (math.isfinite(claim.threshold) and claim.threshold > least):
        yield (
            f"threshold={claim.threshold!r} is not allowed: kind={claim.kind} on a {claim.scale} needs a number "
            f"> {least:g}"
        )
