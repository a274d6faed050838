"""A study that could not be judged as it says is refused before it runs, in words that say what is allowed."""

import pytest

from syncbn.config import ClaimConfig, StudyConfig, TargetConfig, TuneConfig
from syncbn.study_checks import complaints

ARMS = {"a": [], "b": [], "c": []}


def complaint(**study) -> str:
    return "; ".join(complaints(StudyConfig(**{"arms": ARMS} | study)))


def of_claim(**claim) -> str:
    return complaint(claims=[ClaimConfig(**{"name": "x", "arm": "a"} | claim)])


def test_a_sound_study_has_no_complaints():
    claims = [
        ClaimConfig("diff", "a", "b", threshold=-0.1),
        ClaimConfig("ratio", "a", "b", scale="ratio", threshold=0.5),
        ClaimConfig("range", "a", kind="within", range=[0.1, 0.2]),
        ClaimConfig("trend", along=["a", "b", "c"], kind="increasing"),
        ClaimConfig("both", "a", "b", beyond=["b", "c"], kind="greater"),
        ClaimConfig("all", "a", "b", in_every_seed=True),
        ClaimConfig("share", "a", "b", scale="share", kind="greater", threshold=0.8),
    ]
    tune = TuneConfig(values=[0.1, 1.0])
    target = TargetConfig(error=0.1)
    assert complaint(claims=claims, tune=tune, target=target, tiers=["fast", "full"]) == ""


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"arms": {}}, "study.arms is empty"),
        ({"seeds": [1, 1]}, "study.seeds=[1, 1] is not allowed"),
        ({"tiers": ["slow"]}, "tier 'slow' is not allowed: one of fast, full"),
        ({"grid": {"optim.lr": []}}, "study.grid.optim.lr=[] is not allowed"),
        ({"tune": TuneConfig(values=[0.1])}, "study.tune.values=[0.1]"),
        ({"tune": TuneConfig(values=[0.1, 1], seeds=[])}, "study.tune.seeds=[]"),
        ({"tune": TuneConfig(values=[0.1, 1], validation=0.0)}, "must not see the test set"),
        ({"tune": TuneConfig(values=[0.1, 1]), "grid": {"optim.lr": [1.0]}}, "exclude each other"),
        ({"target": TargetConfig()}, "either error"),
        ({"target": TargetConfig(error=0.1, arm="a")}, "either error"),
        ({"target": TargetConfig(error=10)}, "study.target.error=10"),
        ({"target": TargetConfig(arm="z")}, "study.target.arm='z' is none of a, b, c"),
        ({"target": TargetConfig(arm="a"), "grid": {"optim.lr": [1.0]}}, "error is needed"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_judged_is_refused_with_a_reason(study, words):
    assert words in complaint(**study)


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"arm": "z"}, "names arm 'z'; arms: a, b, c"),
        ({"beyond": ["a", "z"], "against": "b"}, "names arm 'z'"),
        ({"kind": "bigger"}, "kind='bigger' is not allowed: one of less, greater"),
        ({"scale": "log"}, "scale='log' is not allowed: one of difference, ratio, share"),
        ({"arm": ""}, "arm is missing"),
        ({"kind": "increasing"}, "arms in order, given as `along`"),
        ({"arm": "", "along": ["a", "b"], "kind": "increasing"}, "at least three arms"),
        ({"along": ["a", "b", "c"]}, "no other kind does"),
        ({"beyond": ["b", "c"]}, "beyond takes two arms"),
        ({"scale": "share"}, "scale=share compares arm with against"),
        ({"kind": "equivalent", "against": "b", "threshold": 0.1, "in_every_seed": True},
         "in_every_seed is not allowed with kind=equivalent"),
        ({"kind": "within"}, "within needs a range"),
        ({"range": [0.1, 0.2]}, "no other kind takes one"),
        ({"kind": "within", "range": [0.2, 0.1]}, "range=[0.2, 0.1] is not allowed"),
        ({"against": "b", "scale": "ratio", "threshold": 0.0}, "needs a number > 0"),
        ({"against": "b", "kind": "equivalent", "threshold": -0.1}, "needs a number > 0"),
        ({"against": "b", "kind": "equivalent", "scale": "ratio", "threshold": 1.0},
         "needs a number > 1"),
        ({"threshold": float("nan")}, "threshold=nan is not allowed"),
        ({"tiers": ["never"]}, "tier 'never'"),
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_judged_is_refused_with_a_reason(claim, words):
    assert words in of_claim(**claim)
