"""The generated part of docs/performance.md: Markdown from results, by pure functions.

The page around it is written by hand and says how things were measured; between its two markers stands what was
measured, and a test holds the page to the newest file of results.
"""

from collections.abc import Iterable, Sequence

from benchmarks import scaling
from benchmarks.verdicts import (
    TARGETS,
    Results,
    Row,
    Verdict,
    combinations,
    geometric_mean,
    ratios,
    select,
    verdicts,
)
from syncbn.norm.comm.transports.sockets import MESH_RANKS

BEGIN = "<!-- begin: written by `make bench` -->"
END = "<!-- end: written by `make bench` -->"

NAMES = {
    "ours": "ours",
    "ours_sockets": "ours, over sockets",
    "ours_gloo": "ours, over gloo alone",
    "local": "torch BatchNorm2d, local",
    "naive": "naive synchronised",
    "fairscale": "fairscale 0.4.13",
    "floor": "memory passes",
    "floor_fresh": "memory passes, fresh memory",
    "without": "no norm layers",
    "by_hand": "loop written by hand",
    "service": "service",
    "service_journal": "service, with its journal",
}
SERVICE_SHARE = 0.97
"""Images a second of the service over those of a loop written by hand that are aimed at."""
EXCHANGES = {
    "shared": "shared memory",
    "sockets": "sockets",
    "gloo": "gloo gather",
    "reduction": "gloo reduction",
}


def generated(results: Results) -> str:
    """All that is shown of `results`."""
    parts = [
        machine_words(results),
        "### Targets",
        verdict_table(verdicts(results)),
        "### One layer on two ranks",
        "![Time of a layer, as a share of torch's local batch norm](figures/bench_layer.png)",
        *layer_tables(select(results["layer"], world_size=2)),
        "### One layer on four ranks",
        *layer_tables(select(results["layer"], world_size=4)),
        "### One rank alone, and the limit",
        "Times of ours / torch's / memory passes / memory passes into fresh memory, in ms.",
        alone_table(select(results["layer"], world_size=1, threads=1)),
        "The same where freed memory stays with the process:",
        alone_table(select(results["allocator"], world_size=1)),
        "### A training step on two ranks",
        model_table(results["model"]),
        "### One exchange",
        "![Time of an exchange against ranks](figures/bench_exchange.png)",
        exchange_table(results["exchange"]),
        "### More ranks: a model",
        scaling_words(results["gather_bytes"], results["gather_ranks"]),
        scaling_table(results),
        "### Fused residual and ReLU",
        fused_table(results["fused"]),
        *service_parts(results),
    ]
    return "\n\n".join(parts)


def text_report(results: Results) -> list[str]:
    """The verdicts, a line each."""
    return [verdict.line() for verdict in verdicts(results)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def machine_words(results: Results) -> str:
    """What was measured on, in a paragraph."""
    m = results["machine"]
    native = "native kernels built" if m["native"] else "no native kernels"
    missing = f" Left out: {', '.join(results['missing'])}." if results["missing"] else ""
    return (
        f"Measured {m['date']} on {m['cpu']}, {m['cores']} cores ({m['simd']}), {m['l2_bytes'] // 2**20} MiB of "
        f"level-2 cache a core, {m['memory_gib']} GiB; torch {m['torch']}; {native}; revision `{m['revision']}`; "
        f"load {m['load_before']} before and {m['load_after']} after; {results['seconds']} s in all.{missing}"
    )


def verdict_table(found: Sequence[Verdict]) -> str:
    """A row a target, a column a layout and dtype; what is not met is bold."""
    columns = list(dict.fromkeys((v.layout, v.dtype) for v in found))
    cells = {(v.target, v.layout, v.dtype): _cell(v) for v in found}
    rows = [
        [target.title, target.words(), *(cells.get((target, *c), "") for c in columns)]
        for target in TARGETS
    ]
    return table(["geometric mean of", "target", *map(" ".join, columns)], rows)


def _cell(verdict: Verdict) -> str:
    return f"{verdict.value:.2f} met" if verdict.met else f"**{verdict.value:.2f} NOT met**"


def layer_tables(rows: Sequence[Row]) -> list[str]:
    """For each layout and dtype a title and a table of milliseconds, with geometric means of ratios below."""
    return [
        part
        for layout, dtype in combinations(rows)
        for part in (
            f"**{layout} {dtype}**, ms forward and backward:",
            _layer_table(select(rows, layout=layout, dtype=dtype)),
        )
    ]


def _layer_table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    body = [[shape_words(row), *(_ms(row, name) for name in names)] for row in rows]
    means = [f"{geometric_mean(ratios(rows, name, 'local')):.2f}" for name in names]
    return table(
        ["shape of a rank", *(NAMES[n] for n in names)], [*body, ["mean ratio to local", *means]]
    )


def shape_words(row: Row) -> str:
    """N x C x H x W."""
    return "x".join(map(str, row["shape"]))


def _ms(row: Row, name: str) -> str:
    return f"{row['ms'][name]:.2f}" if name in row["ms"] else "-"


def alone_table(rows: Sequence[Row]) -> str:
    """A row a shape; each cell has the four times of one layout and dtype."""
    columns = combinations(rows)
    shapes = dict.fromkeys(shape_words(row) for row in rows)
    cells = {
        (shape_words(row), row["layout"], row["dtype"]): " / ".join(
            _ms(row, name) for name in ("ours", "local", "floor", "floor_fresh")
        )
        for row in rows
    }
    body = [[shape, *(cells.get((shape, *c), "") for c in columns)] for shape in shapes]
    return table(["shape", *map(" ".join, columns)], body)


def model_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step with each kind of norm, and the share of it that the norm layers take."""
    body = []
    for row in rows:
        images = "x".join(map(str, row["images"]))
        for name, ms in row["ms"].items():
            share = "" if name == "without" else f"{1 - row['ms']['without'] / ms:.0%}"
            relative = f"{ms / row['ms']['local']:.2f}"
            body.append(
                [f"{row['arch']}, {images} a rank", NAMES[name], f"{ms:.0f}", relative, share]
            )
    head = ["network", "norm layers", "ms a step", "ratio to local", "share of norm layers"]
    return table(head, body)


def exchange_table(rows: Sequence[Row]) -> str:
    """Microseconds of an exchange by ranks and channels, each way that was measured, and how many times memory's."""
    names = [name for name in EXCHANGES if any(name in row["us"] for row in rows)]
    slower = [name for name in ("sockets", "gloo") if name in names]
    body = [
        [
            f"{row['world_size']} ranks, {row['channels']} channels",
            str(row["payload_bytes"]),
            *(f"{row['us'][name]:.1f}" for name in names),
            *(f"{row['us'][name] / row['us']['shared']:.1f}" for name in slower),
        ]
        for row in rows
    ]
    times = [f"{EXCHANGES[name]}, µs" for name in names]
    shares = [f"{EXCHANGES[name]} / shared memory" for name in slower]
    return table(["", "bytes a rank", *times, *shares], body)


def scaling_words(limit_bytes: int, gather_ranks: int) -> str:
    """Where the layer changes from gather to reduction."""
    places = ", ".join(
        f"{channels} channels above {limit_bytes // scaling.gather_bytes(channels)} ranks"
        for channels in scaling.RESNET50
    )
    return (
        f"Over NCCL the layer gathers up to {gather_ranks} ranks and reduces beyond; over gloo it gathers while a rank "
        f"receives at most {limit_bytes / 2**20:g} MiB, and reduces beyond: {places}. "
        "Cells are gather / reduction of one exchange in µs, the way taken in bold; steps are all 106 exchanges "
        "of a ResNet-50, in ms, with the way taken, always a gather, and always a reduction. "
        f"Up to {MESH_RANKS} ranks that share no memory connect with each other directly: the model of gloo begins "
        "beyond them."
    )


def scaling_table(results: Results) -> str:
    """The model's times by number of ranks."""
    limit = results["gather_bytes"]
    gather, reduce = fitted(results["exchange"])
    body = []
    for ranks in scaling.RANKS:
        nccl = {c: scaling.nccl_cost(c, ranks, results["gather_ranks"]) for c in scaling.RESNET50}
        gloo = {c: scaling.gloo_cost(gather, reduce, c, ranks, limit) for c in scaling.RESNET50}
        body.append(
            [
                str(ranks),
                *(cost_words(nccl[c]) for c in (64, 512, 2048)),
                _steps(nccl),
                _steps(gloo) if ranks in scaling.GLOO_RANKS else "-",
            ]
        )
    head = ["ranks", *(f"NCCL, {c} channels" for c in (64, 512, 2048)), "NCCL step", "gloo step"]
    return table(head, body)


def cost_words(cost: scaling.Cost) -> str:
    """Gather / reduction, the chosen one bold."""
    gather, reduce = f"{cost.gather_us:.0f}", f"{cost.reduce_us:.0f}"
    return f"**{gather}** / {reduce}" if cost.gathers else f"{gather} / **{reduce}**"


def _steps(costs: dict[int, scaling.Cost]) -> str:
    ways = (
        {c: cost.chosen_us for c, cost in costs.items()},
        {c: cost.gather_us for c, cost in costs.items()},
        {c: cost.reduce_us for c, cost in costs.items()},
    )
    return " / ".join(f"{scaling.resnet50_step_ms(way):,.1f}" for way in ways)


def fitted(rows: Sequence[Row]) -> tuple[scaling.Line, scaling.Line]:
    """Lines through gloo's gathers and reductions between two ranks."""
    two = select(rows, world_size=2)
    gather_bytes = [scaling.gather_bytes(row["channels"]) for row in two]
    reduce_bytes = [scaling.reduce_bytes(row["channels"]) for row in two]
    return (
        scaling.fit(gather_bytes, [row["us"]["gloo"] for row in two]),
        scaling.fit(reduce_bytes, [row["us"]["reduction"] for row in two]),
    )


def fused_table(rows: Sequence[Row]) -> str:
    """Milliseconds fused and not, and their ratio."""
    body = [
        [
            f"{shape_words(row)} {row['layout']}",
            *(_ms(row, n) for n in ("fused", "sequence")),
            f"{r:.2f}",
        ]
        for row, r in zip(rows, ratios(rows, "fused", "sequence"), strict=True)
    ]
    mean = f"{geometric_mean(ratios(rows, 'fused', 'sequence')):.2f}"
    head = ["shape, fp32", "fused, ms", "norm, add, ReLU, ms", "ratio"]
    return table(head, [*body, ["geometric mean", "", "", mean]])


def service_parts(results: Results) -> list[str]:
    """What the service costs; nothing where it was not measured."""
    if not results.get("service"):
        return []
    return [
        "### The service around a step",
        "Images a second over those of the loop written by hand, of the middle one of several pairs of ranks; the "
        f"target is ≥ {SERVICE_SHARE}.",
        service_table(results["service"]),
        "Ways of training, two ranks:",
        ways_table(results["ways"]),
        "From the command `syncbn train launcher.num_workers=2 train.steps=1`, the least of several runs:",
        start_table(results["start"]),
    ]


def service_table(rows: Sequence[Row]) -> str:
    """Images a second of each loop, and their ratio to the loop by hand."""
    body = []
    for row in rows:
        for name, ms in row["ms"].items():
            share = row["ms"]["by_hand"] / ms
            verdict = _service_words(share, row) if name == "service" else f"{share:.3f}"
            images = f"{1000 * row['global_batch'] / ms:.0f}"
            body.append([_case(row), NAMES[name], f"{ms:.3f}", images, verdict])
    return table(["network", "loop", "ms a step", "images a second", "ratio"], body)


def _service_words(share: float, row: Row) -> str:
    spread = f" ({row['shares'][0]:.3f} to {row['shares'][-1]:.3f})" if "shares" in row else ""
    return (
        f"{share:.3f} met{spread}" if share >= SERVICE_SHARE else f"**{share:.3f} NOT met**{spread}"
    )


def _case(row: Row) -> str:
    return f"{row['case']}, {row['global_batch']} samples a step"


def ways_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step by way of training, and their ratio to float32."""
    body = [
        [_case(row), name, f"{ms:.1f}", f"{ms / row['ms']['float32']:.2f}"]
        for row in rows
        for name, ms in row["ms"].items()
    ]
    return table(["network", "way", "ms a step", "ratio to float32"], body)


def start_table(rows: Sequence[Row]) -> str:
    """Seconds to the first step, to the end, and of processor time."""
    body = [
        [row["tracking"], *(f"{row[name]:.1f}" for name in ("first_step_s", "run_s", "cpu_s"))]
        for row in rows
    ]
    return table(["tracking", "first step done, s", "run over, s", "processor time, s"], body)
