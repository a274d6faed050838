"""Ratios of contenders, and whether they reach their targets.

A ratio is taken within a row, where both contenders took turns, and rows are summarised by their geometric mean, the
only mean that gives the same verdict whichever contender is the denominator.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Results = Mapping[str, Any]


BOTH = "both layouts,"
"""Where a layout is named: all of them."""


@dataclass(frozen=True)
class Target:
    """A bound on the geometric mean of numerator / denominator.

    Attributes:
        title: what is compared, in words.
        section: key of the results whose rows count.
        world_size: of those rows.
        threads: of those rows.
        numerator: a contender.
        denominator: another.
        bound: what the mean may be at most, or must be at least.
        at_least: which of the two.
        aim: what would be better still.
        beyond_cache: count only rows whose tensors do not fit a core's own cache.
    """

    title: str
    section: str
    world_size: int
    threads: int
    numerator: str
    denominator: str
    bound: float
    at_least: bool = False
    aim: float | None = None
    beyond_cache: bool = False

    def admits(self, value: float) -> bool:
        """Whether `value` is within the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def words(self) -> str:
        """The bound as text."""
        aim = "" if self.aim is None else f" (aim {self.aim:g})"
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{aim}"


TARGETS = (
    Target("synchronised / torch local", "layer", 2, 1, "ours", "local", 0.7, aim=0.5),
    Target(
        "synchronised / torch local, freed memory kept",
        "allocator",
        2,
        1,
        "ours",
        "local",
        0.7,
        aim=0.5,
    ),
    Target("naive / synchronised", "layer", 2, 1, "naive", "ours", 8, at_least=True),
    Target("synchronised over sockets / torch local", "layer", 2, 1, "ours_sockets", "local", 1.2),
    Target("synchronised over gloo alone / torch local", "layer", 2, 1, "ours_gloo", "local", 1.2),
    Target("naive / synchronised, 4 ranks", "layer", 4, 1, "naive", "ours", 10, at_least=True),
    Target("one rank / torch local, 1 thread", "layer", 1, 1, "ours", "local", 0.45),
    Target("one rank / torch local, 2 threads", "layer", 1, 2, "ours", "local", 0.45),
    Target(
        "one rank / memory passes",
        "layer",
        1,
        1,
        "ours",
        "floor",
        1.5,
        beyond_cache=True,
    ),
    Target(
        "one rank / memory passes into fresh memory",
        "layer",
        1,
        1,
        "ours",
        "floor_fresh",
        1.5,
        beyond_cache=True,
    ),
    Target(
        "one rank / memory passes, freed memory kept",
        "allocator",
        1,
        1,
        "ours",
        "floor",
        1.5,
        beyond_cache=True,
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A target's value in one layout and dtype."""

    target: Target
    layout: str
    dtype: str
    value: float

    @property
    def met(self) -> bool:
        """Whether the target is met there."""
        return self.target.admits(self.value)

    def line(self) -> str:
        """As one line of text."""
        what = f"{self.target.title}, {self.layout} {self.dtype}"
        return f"{what}: {self.value:.2f} {self.target.words()}: {'met' if self.met else 'NOT met'}"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values; NaN of none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def ratios(rows: Iterable[Row], numerator: str, denominator: str) -> list[float]:
    """The quotients of each row that has both."""
    return [
        row["ms"][numerator] / row["ms"][denominator]
        for row in rows
        if numerator in row["ms"] and denominator in row["ms"]
    ]


def combinations(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """The layouts and dtypes of `rows`, in the order in which they come."""
    return list(dict.fromkeys((row["layout"], row["dtype"]) for row in rows))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Those of `rows` that have the `wanted` values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def is_beyond_cache(row: Row, l2_bytes: int) -> bool:
    """Whether one tensor of this row is larger than a core's own cache."""
    return math.prod(row["shape"]) * (4 if row["dtype"] == "fp32" else 2) > l2_bytes


def verdicts(results: Results, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Every target in every layout and dtype that was measured for it, and in both layouts together."""
    found = []
    for target in targets:
        rows = select(results[target.section], world_size=target.world_size, threads=target.threads)
        if target.beyond_cache:
            rows = [row for row in rows if is_beyond_cache(row, results["machine"]["l2_bytes"])]
        for layout, dtype, counted in _groups(rows):
            own = ratios(counted, target.numerator, target.denominator)
            if own:
                found.append(Verdict(target, layout, dtype, geometric_mean(own)))
    return found


def _groups(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[Row]]]:
    """Rows of each layout and dtype, then those of each dtype that was measured in both layouts."""
    pairs = combinations(rows)
    for layout, dtype in pairs:
        yield layout, dtype, select(rows, layout=layout, dtype=dtype)
    for dtype in dict.fromkeys(dtype for _, dtype in pairs):
        if len([pair for pair in pairs if pair[1] == dtype]) > 1:
            yield BOTH, dtype, select(rows, dtype=dtype)
