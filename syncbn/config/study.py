"""The schema of a study: arms x seeds, and what is claimed of them before it runs.

Everything that a verdict depends on stands in the study's YAML - arms, seeds, tuning, targets, thresholds, and which
claims are primary - so that the history shows what was declared when.
"""

from dataclasses import dataclass, field

from syncbn.config.run import RunConfig

KINDS = ("less", "greater", "equivalent", "within", "different", "increasing", "decreasing")
SCALES = ("difference", "ratio", "share")


@dataclass
class ClaimConfig:
    """A statement on one number a seed, declared before the study runs.

    The number is `arm - against`; the arm's own where there is no `against`; (arm - against) - (beyond[0] - beyond[1])
    for an interaction; or, along several arms in order, how the metric runs with it.
    """

    name: str
    """Of the claim, one word."""
    arm: str = ""
    """The arm that it is about."""
    against: str | None = None
    """The arm that it is compared with; none takes the number of `arm` itself."""
    beyond: list[str] = field(default_factory=list)
    """Two arms whose difference is taken off: an interaction."""
    along: list[str] = field(default_factory=list)
    """Arms in order, for `increasing` and `decreasing`: Kendall's tau of the metric against the order, Page's test."""
    metric: str = ""
    """A metric at the end of a trial, or `metric@step`; empty means what the task decides by: `test_error` where it
    classifies."""
    kind: str = "less"
    """`less`: the whole interval lies below threshold. `greater`: above. `equivalent`: within +-threshold (TOST).
    `within`: inside `range`. `different`: 0 (or ratio 1) lies outside the interval, and the effect is not shown to be
    within +-threshold. `increasing`, `decreasing`: along the arms."""
    threshold: float = 0.0
    """What the interval is held against, in the unit of `scale`; how, `kind` says."""
    range: list[float] = field(default_factory=list)
    """Two ends, for `within`."""
    scale: str = "difference"
    """`difference`: arm - against, in the metric's unit. `ratio`: arm / against, threshold and margin too. `share`:
    the share of the looks during training at which arm lies below against."""
    in_every_seed: bool = False
    """The claim holds only if it does in every single seed (sign test); `less` and `greater`."""
    tiers: list[str] = field(default_factory=lambda: ["fast", "full"])
    """The tiers in which it is judged: what takes the full budget to show cannot be judged in the fast tier."""
    primary: bool = True
    """Counts towards Holm's correction; a secondary claim is judged by its interval alone, and said to be secondary."""
    factor: list[str] | None = None
    """Config groups or dotted keys in which its arms may differ; none means the study's factor."""
    statement: str = ""
    """The claim in words, as printed in the report."""


@dataclass
class TuneConfig:
    """A search that every arm gets alike, before the study, on held-out training samples."""

    key: str = "optim.lr"
    """What is searched over."""
    values: list[float] = field(default_factory=list)
    """Its values."""
    seeds: list[int] = field(default_factory=lambda: [1000, 1001])
    """Seeds of the search alone; the study's own are others."""
    validation: float = 0.1
    """Share of the training samples held out to choose by; the test set is not looked at."""
    steps: int | None = None
    """Steps of a trial of the search; none means the study's."""
    follow: dict[str, str] = field(default_factory=dict)
    """Arms that are not searched for: `bn_x5: none*5` takes five times what was chosen for arm `none`."""


@dataclass
class TargetConfig:
    """What `steps_to_target` counts to, and a grid cell must reach: a value of what the task decides by."""

    error: float | None = None
    """A fraction, or in the unit of what else the task decides by; none takes it from `arm`."""
    arm: str | None = None
    """In each seed the best error that this arm held, in the sense of `tolerance`, is the target."""
    tolerance: float = 0.005
    """How far the next evaluation may lie on the wrong side of the target for the first to count; in its unit."""


@dataclass
class PublishedConfig:
    """A table of figures from the literature, shown beside the study's own."""

    source: str = ""
    """Authors, year, and where in their text."""
    setting: str = ""
    """Data, network, and the figures' unit."""
    columns: list[str] = field(default_factory=list)
    """Heads, after that of the row's name."""
    rows: dict[str, list[str]] = field(default_factory=dict)
    """Figures in the order of `columns`, by the name of a row."""


@dataclass
class StudyConfig:
    """Arms x seeds, and what is claimed of them."""

    question: str = ""
    """What the study asks, in one sentence."""
    statement: str = ""
    """What the text on batch norm says, in one sentence."""
    order: int = 100
    """Where it stands among the studies."""
    tiers: list[str] = field(default_factory=list)
    """Of `fast` and `full`: which runs of all studies it belongs to."""
    tier: str = "full"
    """The tier that this is: `fast` with the overrides below, else `full`."""
    budget_s: float = 0.0
    """How long the full tier may take on two cores, in seconds, as declared."""
    fast: list[str] = field(default_factory=list)
    """Overrides that make its fast tier of it."""
    seeds: list[int] = field(default_factory=lambda: list(range(6)))
    """Every arm is trained once with each; arms are compared within a seed."""
    factor: list[str] = field(default_factory=lambda: ["norm"])
    """Config groups (or dotted keys) in which arms may differ; any other difference is refused."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """Arm name to its overrides."""
    grid: dict[str, list[float]] = field(default_factory=dict)
    """Keys and values: every arm is run in every combination, each an arm of its own, `<arm>_<value>_<value>`."""
    tune: TuneConfig | None = None
    """A search that every arm gets before the study; none tunes nothing."""
    target: TargetConfig | None = None
    """What `steps_to_target` counts to; none counts nothing."""
    primary_metric: str = ""
    """What the study is about, and what its figures show first; empty means what the task decides by."""
    claims: list[ClaimConfig] = field(default_factory=list)
    """What is claimed, before it runs."""
    published: list[PublishedConfig] = field(default_factory=list)
    """Tables of figures from the literature, shown beside the study's own."""
    later: str = ""
    """Where later work contradicts or qualifies the statement: two sentences with their source."""

    @property
    def judged(self) -> list[ClaimConfig]:
        """The claims of this tier."""
        return [claim for claim in self.claims if self.tier in claim.tiers]


@dataclass
class Config(RunConfig):
    """What is composed: a run, and the study around it where there is one."""

    study: StudyConfig | None = None
