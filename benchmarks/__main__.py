"""Measure, write, show: `python -m benchmarks [--brief] [--only SECTION ...] [--show]`.

Sections run one after another and each prints what it sees; at the end come the verdicts, a JSON file in
`benchmarks/results/` and `docs/performance.md` with its figures. `--show` renders the newest file again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, page, plots, ranks, service
from benchmarks.cases import DTYPES, LAYOUTS, SHAPES, Shape
from benchmarks.contenders import LAYERS, PEERS, installed
from benchmarks.verdicts import verdicts
from syncbn.marked import insert
from syncbn.norm.comm.transports import process_group as wire

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Effort:
    """How much is measured: shapes of a layer, and a factor on the seconds spent on each case."""

    shapes: Sequence[Shape] = SHAPES
    scale: float = 1.0

    def cases(self) -> dict[str, Any]:
        """All layouts and dtypes of the shapes."""
        return {"shapes": self.shapes, "layouts": tuple(LAYOUTS), "dtypes": tuple(DTYPES)}


BRIEF = Effort(SHAPES[:5:2], 0.1)
FOUR_RANK_SHAPES = ((2, 64, 56, 56), (8, 128, 28, 28), (8, 1024, 14, 14))
FUSED_SHAPES = ((8, 256, 56, 56), (8, 128, 28, 28), (8, 1024, 14, 14), (32, 2048, 7, 7))
FOUR = ("ours", "local", "naive")
KEPT = ("ours", "local")
ALONE = ("ours", "local", "floor", "floor_fresh")
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
"""Settings of glibc under which freed memory stays with the process."""


def layer(effort: Effort) -> list[dict[str, Any]]:
    """Two ranks, four ranks, and one alone with one thread and with two."""
    four = {"shapes": FOUR_RANK_SHAPES, "layouts": tuple(LAYOUTS), "dtypes": ("fp32",)}
    two, few = 3.5 * effort.scale, 5 * effort.scale
    return [
        *ranks.run("layer:measure", 2, contenders=tuple(LAYERS), budget_s=two, **effort.cases()),
        *ranks.run("layer:measure", 4, contenders=FOUR, budget_s=few, **four),
        *_alone(effort, threads=1),
        *_alone(effort, threads=2),
    ]


def allocator(effort: Effort) -> list[dict[str, Any]]:
    """One rank alone and two, where freed memory stays with the process."""
    kept = {"environ": KEEP_MEMORY, "contenders": KEPT, "budget_s": effort.scale}
    return [
        *_alone(effort, environ=KEEP_MEMORY),
        *ranks.run("layer:measure", 2, **kept, **effort.cases()),
    ]


def _alone(effort: Effort, **how: Any) -> list[dict[str, Any]]:
    return ranks.run(
        "layer:measure", contenders=ALONE, budget_s=effort.scale, **effort.cases(), **how
    )


def model(effort: Effort) -> list[dict[str, Any]]:
    """Training steps of two networks on two ranks."""
    images = (8, 3, 64, 64)
    return [
        ranks.run("model:measure", 2, arch=arch, images=images, budget_s=25 * effort.scale)
        for arch in ("resnet18", "resnet50")
    ]


def exchange(effort: Effort) -> list[dict[str, Any]]:
    """Exchanges between two and between four ranks."""
    channels = (64, 256, 1024, 2048, 4096)
    return [
        row
        for world_size in (2, 4)
        for row in ranks.run(
            "exchange:measure", world_size, channels=channels, budget_s=3 * effort.scale
        )
    ]


def fused(effort: Effort) -> list[dict[str, Any]]:
    """Fused and unfused layers on two ranks."""
    given = {"shapes": FUSED_SHAPES, "layouts": tuple(LAYOUTS)}
    return ranks.run("fused:measure", 2, budget_s=3 * effort.scale, **given)


SECTIONS: dict[str, Callable[[Effort], list[dict[str, Any]]]] = {
    "layer": layer,
    "allocator": allocator,
    "model": model,
    "exchange": exchange,
    "fused": fused,
    "service": lambda effort: service.loops(effort.scale),
    "ways": lambda effort: service.ways_of_training(effort.scale),
    "start": lambda effort: service.starts(effort.scale),
}


def measure(only: list[str], effort: Effort) -> dict[str, Any]:
    """All sections, or `only` some."""
    results: dict[str, Any] = {
        "machine": machine.describe(),
        "gather_bytes": wire.GATHER_BYTES,
        "gather_ranks": wire.GATHER_RANKS,
    }
    results |= {name: [] for name in SECTIONS}
    missing = sorted(set(PEERS) - set(installed(list(PEERS))))
    results["missing"] = missing
    for name in missing:
        print(f"{name} is not installed and is left out: make bench installs it where it can")
    start = time.perf_counter()
    for name in only or SECTIONS:
        print(f"{name} ({time.perf_counter() - start:.0f} s so far)", flush=True)
        results[name] = SECTIONS[name](effort)
    results["machine"]["load_after"] = round(os.getloadavg()[0], 1)
    results["seconds"] = round(time.perf_counter() - start)
    return results


def newest() -> Path:
    """The results that the docs quote: the last by date.

    Raises:
        SystemExit: there are none.
    """
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"no results in {RESULTS}: run `make bench`")
    return files[-1]


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--brief", action="store_true", help="a few shapes, briefly; writes nothing"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="writes nothing")
    parser.add_argument("--show", action="store_true", help="render the newest results again")
    options = parser.parse_args()
    if options.show:
        show(json.loads(newest().read_text()))
        return
    results = measure(options.only, BRIEF if options.brief else Effort())
    print("\n".join(page.text_report(results)))
    print(f"took {results['seconds']} s")
    if not options.brief and not options.only:
        path = RESULTS / f"{machine.slug(results['machine'])}.json"
        path.write_text(json.dumps(results, indent=None, separators=(",", ":")) + "\n")
        show(results)
        print(f"wrote {path.name} and docs/performance.md")


def show(results: dict[str, Any]) -> None:
    """Write figures and the generated part of docs/performance.md."""
    for picture in plots.draw(results):
        (ranks.ROOT / "docs/figures" / f"{picture.name}.png").write_bytes(picture.png)
    path = ranks.ROOT / "docs/performance.md"
    path.write_text(insert(path.read_text(), page.BEGIN, page.END, page.generated(results)))
    for verdict in verdicts(results):
        print(verdict.line())


if __name__ == "__main__":
    main()
