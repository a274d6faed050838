"""Two launches of one study: whether they are that, and which claims the later one lost.

The decision that shaped the file: what two launches must share is their design, not their code, settings of the
optimiser or versions; a change of those is what they are compared for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from syncbn.compare.claims import INCONCLUSIVE, REPRODUCED
from syncbn.compare.reading import Summary
from syncbn.errors import UsageError

LEAST_SEEDS = 2
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


@dataclass(frozen=True)
class ClaimChange:
    """A claim that was reproduced, and no longer is."""

    name: str
    verdict: str
    counts: bool
    """Whether it makes the study worse."""
    note: str


def refuse_unlike(base: Summary, new: Summary) -> None:
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


def shared_seeds(base: Summary, new: Summary) -> list[int]:
    """The seeds that both have, in the order of the base.

    Raises:
        UsageError: they are fewer than two.
    """
    seeds = [seed for seed in base["design"]["seeds"] if seed in new["design"]["seeds"]]
    if len(seeds) < LEAST_SEEDS:
        raise UsageError(
            f"the launches share the seeds {seeds}, of {base['design']['seeds']} and {new['design']['seeds']}: at "
            f"least {LEAST_SEEDS} are needed, and 6 to see more than the largest changes"
        )
    return seeds


def lost_claims(base: Summary, new: Summary) -> list[ClaimChange]:
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
