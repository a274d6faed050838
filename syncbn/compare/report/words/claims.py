"""Claims and their effects in words: what is compared, what was demanded, what was found, and the evidence.

An effect has one of five forms (a difference, a ratio, a share of looks, a trend, an arm's own value), and words and
figures ask `form` which. A verdict always comes with the effect, its interval and what was demanded, so that a reader
can disagree with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.compare.measure import PERCENT, POINTS, of_claim
from syncbn.compare.report.words.numbers import (
    MINUS,
    NOTHING,
    TIMES,
    byte_words,
    is_zero,
    number,
    p_words,
    percent,
    value_words,
)
from syncbn.compare.report.words.study import arm_words
from syncbn.compare.report.words.text import capital
from syncbn.compare.statistics.claims import VERDICTS

Claim = Mapping[str, Any]


def form(claim: Claim) -> str:
    """What the claim's number is: `ratio`, `share`, `trend`, `value` or `difference`."""
    if claim.get("along"):
        return "trend"
    if claim["scale"] in ("ratio", "share"):
        return claim["scale"]
    return "difference" if claim.get("against", True) else "value"


def is_fraction(claim: Claim) -> bool:
    """Whether the claim's number is shown times 100."""
    if form(claim) == "share":
        return True
    plain = form(claim) in ("difference", "value")
    return plain and of_claim(claim).unit in (PERCENT, POINTS)


def no_effect(claim: Claim) -> float | None:
    """The number that means "no effect", None where there is none."""
    return {"ratio": 1.0, "share": 0.5, "trend": 0.0, "difference": 0.0}.get(form(claim))


def unit_of(claim: Claim) -> str:
    """The unit after the claim's number, with a blank before it."""
    kind, unit = form(claim), of_claim(claim).unit
    if kind in ("ratio", "trend") or unit == "bytes":
        return ""
    if kind == "share":
        return " %"
    return " points" if kind == "difference" and unit == PERCENT else f" {unit}".rstrip()


def effect_number(claim: Claim, value: float | None) -> str:
    """The claim's number without its unit; a difference and a trend with their sign."""
    if value is None:
        return NOTHING
    bytewise = of_claim(claim).unit == "bytes" and form(claim) in ("difference", "value")
    text = (
        percent(value) if is_fraction(claim) else byte_words(value) if bytewise else number(value)
    )
    signed = form(claim) in ("difference", "trend") and value != 0
    return text if text.startswith(MINUS) or not signed or is_zero(text) else f"+{text}"


def effect_words(claim: Claim, value: float | None) -> str:
    """An effect, an interval's end or a threshold of `claim` with its unit: `-30.1 points`, `x0.42`, `94.0 %`."""
    if value is None:
        return NOTHING
    sign = {"ratio": TIMES, "trend": "tau "}.get(form(claim), "")
    return f"{sign}{effect_number(claim, value)}{unit_of(claim)}"


_BOUNDS = {"trend": (-1.0, 1.0), "share": (0.0, 1.0)}
"""What a number of that form cannot go beyond; a t interval does not know it."""


def interval_words(claim: Mapping[str, Any], ends: Sequence[float | None]) -> str:
    """An interval of `claim`, in the unit of its effect: `-38.3 to -24.9 points`."""
    low, high = ends
    if low is None or high is None:
        return NOTHING
    least, most = _BOUNDS.get(form(claim), (low, high))
    sign = TIMES if form(claim) == "ratio" else ""
    words = (sign + effect_number(claim, end) for end in (max(low, least), min(high, most)))
    return " to ".join(words) + unit_of(claim)


def without_unit(claim: Claim, words: str) -> str:
    """`words` about `claim` for a cell beside its effect, which names the unit already."""
    return words.removesuffix(unit_of(claim)) if unit_of(claim) else words


def threshold_words(claim: Claim) -> str:
    """What the claim demands: `below -20.0 points`, `within ±2.0 points`, `between 75.0 and 90.0 %`."""
    everywhere = " in every seed" if claim["in_every_seed"] else ""
    return _DEMANDS[claim["kind"]](claim) + everywhere


def _side(word: str, claim: Claim) -> str:
    return f"{word} {effect_words(claim, claim['threshold']) if claim['threshold'] else '0'}"


def _equivalent(claim: Claim) -> str:
    margin = claim["threshold"]
    if form(claim) == "ratio":
        return f"within {interval_words(claim, (1 / margin, margin))}"
    return "within ±" + effect_words(claim, margin).lstrip("+")


def _within(claim: Claim) -> str:
    low, high = claim["range"]
    return f"between {interval_words(claim, (low, high)).replace(' to ', ' and ')}"


def _different(claim: Claim) -> str:
    none = f"{TIMES}1" if form(claim) == "ratio" else "0"
    return f"other than {none}" + (f", not {_equivalent(claim)}" if claim["threshold"] else "")


def _trend(word: str, claim: Claim) -> str:
    steep = f" (tau beyond {number(abs(claim['threshold']))})" if claim["threshold"] else ""
    return f"{word} along {', '.join(claim['along'])}{steep}"


_DEMANDS = {
    "less": lambda claim: _side("below", claim),
    "greater": lambda claim: _side("above", claim),
    "equivalent": _equivalent,
    "within": _within,
    "different": _different,
    "increasing": lambda claim: _trend("rising", claim),
    "decreasing": lambda claim: _trend("falling", claim),
}


def compared_words(claim: Claim) -> str:
    """Whose metric it is: `sync - local`, `sync / local`, `(a - b) - (c - d)`, `bn`, `along a, b, c`."""
    if claim["along"]:
        return f"along {', '.join(claim['along'])}"
    if not claim["against"]:
        return claim["arm"]
    if claim["scale"] == "share":
        return f"{claim['arm']} below {claim['against']}"
    sign = "/" if claim["scale"] == "ratio" else MINUS
    pair = f"{claim['arm']} {sign} {claim['against']}"
    return f"({pair}) {sign} ({f' {sign} '.join(claim['beyond'])})" if claim["beyond"] else pair


def comparison_words(claim: Claim) -> str:
    """What is compared: `test error, sync - local`."""
    share = "share of looks, " if claim["scale"] == "share" else ""
    return f"{share}{of_claim(claim).words}, {compared_words(claim)}"


def verdict_sentence(claim: Claim) -> str:
    """The evidence for the verdict on `claim`, in one or two plain sentences."""
    found = effect_words(claim, claim["effect"])
    if None not in claim["ci"]:
        found += f", 95 % interval {interval_words(claim, claim['ci'])} over {claim['n']} seeds"
    if claim["effect"] is None:
        found = "no effect can be given"
    return f"{capital(comparison_words(claim))}: {found}. {conclusion(claim)}"


def conclusion(claim: Claim) -> str:
    """What the evidence says of what was claimed, in a sentence."""
    demand = threshold_words(claim)
    if claim["verdict"] == "INCONCLUSIVE":
        why = f"undecided, because {claim['note']}" if claim["note"] else "these seeds cannot tell"
        return f"Claimed was {demand}; {why}."
    if claim["verdict"] == "NOT REPRODUCED":
        return f"Claimed was {demand}; {_against(claim)}."
    p = f" (p {p_words(claim['p_holm'])})" if _tested(claim) else ""
    return f"{_support(claim)}, as claimed{p}."


def _tested(claim: Claim) -> bool:
    """Whether the test says more than the interval does."""
    return claim["in_every_seed"] or claim["kind"] in ("equivalent", "increasing", "decreasing")


def _against(claim: Claim) -> str:
    if claim["in_every_seed"]:
        return "some seed lies on the other side"
    if claim["kind"] == "different":
        return f"both one-sided tests put it {_equivalent(claim)}"
    return "the whole interval lies elsewhere"


def _support(claim: Claim) -> str:
    demand = threshold_words(claim)
    if claim["in_every_seed"]:
        return f"It lies {demand}"
    if claim["kind"] == "equivalent":
        return f"Both one-sided tests put it {demand}"
    if claim["kind"] in ("increasing", "decreasing"):
        return f"Page's test finds it {demand}"
    return f"The whole interval lies {'beside 0' if claim['kind'] == 'different' else demand}"


def finding(claim: Claim, medians: Mapping[str, float | None]) -> str:
    """What was found, in one sentence for a reader who knows no statistics; without the verdict.

    Args:
        claim: as the summary holds it.
        medians: of the claim's metric, by arm.
    """
    effect, words, arm = claim["effect"], of_claim(claim).words, arm_words(claim["arm"])
    if effect is None:
        return (
            f"{capital(comparison_words(claim))}: no number can be given, as some seeds have none."
        )
    against = arm_words(claim["against"] or "")
    if form(claim) == "trend":
        way = "rises" if effect > 0 else "falls" if effect < 0 else "neither rises nor falls"
        ends = _ends(claim, medians, (claim["along"][0], claim["along"][-1]), " to ")
        return f"{capital(words)} {way} along {', '.join(claim['along'])}{ends}."
    if form(claim) == "value":
        return f"{capital(words)} with {arm}: {effect_words(claim, effect)}."
    if form(claim) == "share":
        return (
            f"In {effect_words(claim, effect)} of the looks, {arm} lies below {against}: {words}."
        )
    if claim["beyond"]:
        return f"{capital(words)}, {compared_words(claim)}: {effect_words(claim, effect)}."
    return f"{capital(words)} with {arm} {_beside(claim, effect, against)}{_ends(claim, medians)}."


def _beside(claim: Claim, effect: float, against: str) -> str:
    """How the arm stands to the other: `is 29.9 points lower than with local`."""
    if form(claim) == "ratio":
        return f"is {number(effect)} times that with {against}"
    size = effect_words({**claim, "scale": "difference"}, abs(effect)).lstrip("+")
    if is_zero(size):
        return f"is that with {against}, to the digits shown"
    return f"is {size} {'lower' if effect < 0 else 'higher'} than with {against}"


def _ends(
    claim: Claim,
    medians: Mapping[str, float | None],
    pair: Sequence[str] = (),
    joint: str = " against ",
) -> str:
    """The two medians in brackets, where both are known."""
    found = [medians.get(arm) for arm in pair or (claim["arm"], claim["against"])]
    if None in found:
        return ""
    return f" ({joint.join(value_words(of_claim(claim), value) for value in found)})"


def tally(claims: Sequence[Claim]) -> str:
    """How many claims were reproduced: `2 of 3 claims reproduced, 1 inconclusive`; secondary ones apart."""
    primary = [claim for claim in claims if claim["primary"]]
    others = [claim for claim in claims if not claim["primary"]]
    if not claims:
        return "No claim was declared"
    words = [_count(primary, "claim")] if primary else []
    words += [_count(others, "secondary claim")] if others else []
    return "; ".join(words)


def _count(claims: Sequence[Claim], noun: str) -> str:
    count = {word: sum(c["verdict"] == word for c in claims) for word in VERDICTS}
    others = [f"{count[word]} {word.lower()}" for word in VERDICTS[1:] if count[word]]
    noun += "" if len(claims) == 1 else "s"
    return ", ".join([f"{count[VERDICTS[0]]} of {len(claims)} {noun} reproduced", *others])


def overall(claims: Sequence[Claim]) -> str:
    """One word for the study: its primary claims' verdict where they share one, else `MIXED`; `NO CLAIM` without."""
    words = {claim["verdict"] for claim in claims if claim["primary"]}
    if not words:
        return "NO CLAIM"
    return words.pop() if len(words) == 1 else "MIXED"
