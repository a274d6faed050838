"""What `benchmarks.gpu` measured, as Markdown: `python -m benchmarks.gpu_page [RESULT.json]` writes it into the docs.

Without an argument it shows the newest file of `benchmarks/results/gpu/`. Rows hold their times by how they were taken:
as called, replayed from a graph, or of the kernels alone.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.page import shape_words, table
from benchmarks.verdicts import Results, Row, combinations, geometric_mean, ratios, select
from syncbn.marked import insert

BEGIN = "<!-- begin: written by `python -m benchmarks.gpu_page` -->"
END = "<!-- end: written by `python -m benchmarks.gpu_page` -->"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/gpu"

NAMES = {
    "ours": "ours",
    "torch_sync": "torch SyncBatchNorm",
    "local": "torch BatchNorm2d, local",
    "fused": "fused",
    "sequence": "norm, add, ReLU",
}
HOW = {"called_ms": "as called", "graph_ms": "from a graph", "kernels_ms": "kernels alone"}


class Bound(NamedTuple):
    """A bound on the geometric mean of a ratio; None where there is none.

    Attributes:
        title: what is compared.
        section: key of the results whose rows count.
        ratios: of rows.
        value: of the bound.
        at_least: whether the mean must be no less, rather than no more.
    """

    title: str
    section: str
    ratios: Callable[[Sequence[Row]], list[float]]
    value: float | None = None
    at_least: bool = False

    def words(self) -> str:
        """The bound as text."""
        return "" if self.value is None else f"{'≥' if self.at_least else '≤'} {self.value:g}"

    def cell(self, rows: Sequence[Row]) -> str:
        """The mean over `rows`, and what the bound says of it."""
        mean = geometric_mean(self.ratios(rows))
        if self.value is None:
            return f"{mean:.3f}"
        met = mean >= self.value if self.at_least else mean <= self.value
        return f"{mean:.3f} met" if met else f"**{mean:.3f} NOT met**"


def taken(how: str, numerator: str, denominator: str) -> Callable[[Sequence[Row]], list[float]]:
    """Ratios of two contenders' times, taken one way."""
    return lambda rows: ratios([{"ms": row[how]} for row in rows], numerator, denominator)


def of_the_copy(rows: Sequence[Row]) -> list[float]:
    """The share of a copy's bandwidth that ours reaches: the time of eight passes at that rate over its own."""
    return [row["floor_ms"] / row["graph_ms"]["ours"] for row in rows]


BOUNDS = (
    Bound(
        "ours / torch SyncBatchNorm, as called",
        "layers",
        taken("called_ms", "ours", "torch_sync"),
        0.75,
    ),
    Bound(
        "ours / torch SyncBatchNorm, kernels alone",
        "layers",
        taken("kernels_ms", "ours", "torch_sync"),
        0.75,
    ),
    Bound("ours / torch local, from a graph", "layers", taken("graph_ms", "ours", "local")),
    Bound(
        "the same, tensors of 103 to 206 MB",
        "large",
        taken("graph_ms", "ours", "local"),
    ),
    Bound(
        "share of the copy's bandwidth, 103 to 206 MB",
        "large",
        of_the_copy,
        0.85,
        at_least=True,
    ),
    Bound(
        "norm, add, ReLU / fused, as called",
        "fused",
        taken("called_ms", "sequence", "fused"),
        1.5,
        at_least=True,
    ),
    Bound(
        "norm, add, ReLU / fused, from a graph",
        "fused",
        taken("graph_ms", "sequence", "fused"),
        1.5,
        at_least=True,
    ),
    Bound(
        "the same, 103 to 206 MB",
        "fused_large",
        taken("graph_ms", "sequence", "fused"),
        1.5,
        at_least=True,
    ),
)


def generated(results: Results) -> str:
    """All that is shown of `results`."""
    parts = [
        f"Measured {results['date']} on one {results['device']}, torch {results['torch']}, Triton "
        f"{results['triton']}; a copy of 1 GiB moves {results['copy_bytes_per_s'] / 1e12:.2f} TB/s, bytes read and "
        "written added.",
        bounds_table(results),
        *times("One layer, forward and backward, ms", [*results["layers"], *results["large"]]),
        *times("relu(norm(x) + residual), ms", [*results["fused"], *results["fused_large"]]),
        "**A training step of a ResNet-50**, bfloat16 autocast, channels_last, batch "
        f"{results['network']['batch']}, ms:",
        network_table(results["network"]),
    ]
    return "\n\n".join(parts)


def bounds_table(results: Results) -> str:
    """A row a bound, a column a layout and dtype, and one for all."""
    columns = combinations(results["layers"])
    body = []
    for bound in BOUNDS:
        rows = results[bound.section]
        cells = [bound.cell(select(rows, layout=at, dtype=dtype)) for at, dtype in columns]
        body.append([bound.title, bound.words(), *cells, bound.cell(rows)])
    head = ["geometric mean of", "target", *map(" ".join, columns), "all"]
    return table(head, body)


def times(title: str, rows: Sequence[Row]) -> list[str]:
    """For each layout and dtype a title, and a table of all that was taken."""
    return [
        part
        for layout, dtype in combinations(rows)
        for part in (
            f"**{title}**: {layout} {dtype}",
            _times_table(select(rows, layout=layout, dtype=dtype)),
        )
    ]


def _times_table(rows: Sequence[Row]) -> str:
    columns = [(how, name) for how in HOW if how in rows[0] for name in rows[0][how]]
    body = [[shape_words(row), *(f"{row[how][name]:.3f}" for how, name in columns)] for row in rows]
    return table(["shape", *(f"{NAMES[name]}, {HOW[how]}" for how, name in columns)], body)


def network_table(row: Row) -> str:
    """A row a way of taking times, a column a kind of norm."""
    names = list(row["called_ms"])
    body = [[HOW[how], *(_step(row[how], name) for name in names)] for how in HOW if how in row]
    return table(["", *(NAMES[name] for name in names)], body)


def _step(ms: dict[str, float], name: str) -> str:
    return f"{ms[name]:.2f} ({ms[name] / ms['local']:.2f} of local)" if name in ms else "-"


def newest() -> Path:
    """The results that the docs quote: the last by date."""
    return max(RESULTS.glob("*.json"))


def main() -> None:
    """Write what is generated into docs/performance.md."""
    given = [Path(argument) for argument in sys.argv[1:]]
    result = given[0] if given else newest()
    page = ROOT / "docs/performance.md"
    text = generated(json.loads(result.read_text()))
    page.write_text(insert(page.read_text(), BEGIN, END, text))


if __name__ == "__main__":
    main()
