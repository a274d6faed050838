"""The benchmarks' pure parts, and one tiny run of the real thing; how fast anything is, is never a test."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.untraced
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks import __main__ as program  # noqa: E402
from benchmarks import checkpoints, image_folder, layer, machine, page, plots, ranks, scaling  # noqa: E402
from benchmarks.cases import DTYPES, LAYOUTS, Case, all_cases  # noqa: E402
from benchmarks.contenders import memory_passes  # noqa: E402
from benchmarks.verdicts import (  # noqa: E402
    Target,
    geometric_mean,
    is_beyond_cache,
    ratios,
    verdicts,
)
from syncbn.marked import insert  # noqa: E402
from syncbn.norm.comm.transports.sockets import MESH_RANKS  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))
positive = st.floats(1e-3, 1e3)


def _row(shape: tuple[int, ...] = (8, 64, 56, 56), **changes: Any) -> dict[str, Any]:
    ms = {"ours": 2.0, "ours_sockets": 3.0, "ours_gloo": 4.0, "local": 4.0, "naive": 20.0}
    floors = {"floor": 1.0, "floor_fresh": 1.5}
    place = {"world_size": 2, "threads": 1, "layout": "NCHW", "dtype": "fp32", "rounds": 9}
    return {**place, "shape": list(shape), "ms": {**ms, **floors}, **changes}


def _exchange(world_size: int, channels: int) -> dict[str, Any]:
    gathers = {"shared": 2.0, "sockets": 40.0, "gloo": 300 + channels / 10}
    us = {**gathers, "reduction": 500 + channels / 5}
    return {"world_size": world_size, "channels": channels, "payload_bytes": 8 * channels, "us": us}


def _results() -> dict[str, Any]:
    known = {"date": "2026-01-02", "cpu": "Some CPU", "cores": 2, "l2_bytes": 2**21, "native": True}
    about = {"memory_gib": 8, "torch": "2.15.0", "simd": "AVX2", "revision": "abc"}
    step = {"ours": 90.0, "local": 100.0, "naive": 200.0, "without": 60.0}
    fused = [_row(ms={"fused": 1.0, "sequence": 2.0})]
    return {
        "machine": {**known, **about, "load_before": 0.1, "load_after": 2.0},
        "gather_bytes": 2**20,
        "gather_ranks": 16,
        "missing": ["fairscale"],
        "seconds": 600,
        "layer": [_row(), _row(world_size=4), _row(world_size=1), _row(world_size=1, threads=2)],
        "allocator": [_row(world_size=1)],
        "model": [{"arch": "resnet18", "images": [8, 3, 64, 64], "ms": step, "rounds": 5}],
        "exchange": [_exchange(w, c) for w in (2, 4) for c in (64, 2048)],
        "fused": fused,
    }


@given(st.lists(positive, min_size=1, max_size=9))
def test_a_geometric_mean_judges_alike_whichever_contender_is_below(values: list[float]) -> None:
    inverse = geometric_mean([1 / value for value in values])
    assert math.isclose(geometric_mean(values) * inverse, 1, rel_tol=1e-9)


def test_a_case_that_lacks_a_contender_has_no_ratio() -> None:
    rows = [_row(), _row(ms={"ours": 1.0})]
    assert ratios(rows, "naive", "ours") == [10.0]


@pytest.mark.parametrize(("at_least", "met"), [(False, True), (True, False)])
def test_a_target_is_a_bound_from_above_or_from_below(at_least: bool, met: bool) -> None:
    target = Target("a", "layer", 2, 1, "ours", "local", 0.6, at_least=at_least)
    (verdict,) = verdicts(_results(), [target])
    assert verdict.value == pytest.approx(0.5)
    assert verdict.met is met
    assert ("NOT met" in verdict.line()) is not met


def test_a_target_counts_only_its_own_ranks_and_threads() -> None:
    results = _results()
    results["layer"] = [_row(threads=2), _row(world_size=4), _row(ms={"ours": 3.0, "local": 1.0})]
    (verdict,) = verdicts(results, [Target("a", "layer", 2, 1, "ours", "local", 1.0)])
    assert verdict.value == pytest.approx(3.0)


def test_both_layouts_together_are_one_more_verdict() -> None:
    results = _results()
    rows = [_row(ms={"ours": 1.0, "local": 1.0}), _row(ms={"ours": 4.0, "local": 1.0})]
    results["layer"] = [rows[0], {**rows[1], "layout": "channels_last"}]
    found = verdicts(results, [Target("a", "layer", 2, 1, "ours", "local", 1.0)])
    values = [verdict.value for verdict in found]
    assert values == pytest.approx([1.0, 4.0, 2.0])


def test_the_limit_counts_where_a_tensor_exceeds_a_cores_cache() -> None:
    row = _row((1, 64, 64, 128))  # 2 MiB in float32
    assert is_beyond_cache(row, 2**21 - 1)
    assert not is_beyond_cache(row, 2**21)
    assert not is_beyond_cache({**row, "dtype": "bf16"}, 2**21 - 1)


def test_every_verdict_is_shown_met_or_not() -> None:
    results = _results()
    results["layer"][0]["ms"]["ours"] = 400.0
    text = page.generated(results)
    assert "**100.00 NOT met**" in text
    assert " met |" in text
    assert len(page.text_report(results)) == len(verdicts(results))


def test_tables_have_as_many_cells_in_each_row() -> None:
    lines = [line for line in page.generated(_results()).splitlines() if line.startswith("|")]
    blocks: list[list[int]] = []
    for line in lines:
        cells = line.count("|")
        if blocks and blocks[-1][0] == cells:
            blocks[-1].append(cells)
        else:
            blocks.append([cells])
    assert all(len(block) >= 3 for block in blocks)


def test_each_way_of_an_exchange_that_was_measured_has_its_times() -> None:
    rows = [_exchange(2, 64)]
    assert "| 2.0 | 40.0 | 306.4 | 512.8 | 20.0 | 153.2 |" in page.exchange_table(rows)
    del rows[0]["us"]["sockets"]
    assert "| 2.0 | 306.4 | 512.8 | 153.2 |" in page.exchange_table(rows)


def test_gloo_is_modelled_beyond_the_ranks_that_connect_with_each_other() -> None:
    lines = page.scaling_table(_results()).splitlines()[2:]
    modelled = [int(line.split(" | ")[0].strip("| ")) for line in lines if " | - |" not in line]
    assert modelled == [ranks for ranks in scaling.RANKS if ranks > MESH_RANKS]
    assert f"Up to {MESH_RANKS} ranks" in page.scaling_words(2**20, 16)


@pytest.mark.skipif(not RESULTS, reason="no results yet: make bench")
def test_the_docs_quote_the_newest_results() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    generated = page.generated(json.loads(RESULTS[-1].read_text()))
    assert insert(text, page.BEGIN, page.END, generated) == text


def test_showing_results_writes_the_page_and_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "docs/performance.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    monkeypatch.setattr(ranks, "ROOT", tmp_path)
    program.show(_results())
    shown = (tmp_path / "docs/performance.md").read_text()
    figures = re.findall(r"\]\((figures/.+?)\)", shown)
    assert len(figures) == 2
    assert all((tmp_path / "docs" / figure).stat().st_size > 0 for figure in figures)


def test_the_newest_results_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="make bench"):
        program.newest()
    for name in ("2026-02-01-b.json", "2025-12-31-c.json", "2026-01-31-a.json"):
        (tmp_path / name).touch()
    assert program.newest().name == "2026-02-01-b.json"


def test_figures_are_drawn_from_results() -> None:
    pictures = plots.draw(_results())
    assert [picture.name for picture in pictures] == ["bench_layer", "bench_exchange"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)


@given(st.floats(0, 1e3), st.floats(0, 1e-1))
def test_a_line_is_found_again_from_its_points(latency: float, slope: float) -> None:
    sizes = [512, 2048, 8192, 32768]
    line = scaling.fit(sizes, [latency + slope * size for size in sizes])
    assert line.latency_us == pytest.approx(latency, abs=1e-6 + 1e-9 * slope * 32768)
    assert line.us_per_byte == pytest.approx(slope, abs=1e-9)


def test_the_model_gives_two_ranks_what_was_measured() -> None:
    line = scaling.Line(300.0, 0.01)
    assert scaling.gloo_gather_us(line, 1000, 2) == pytest.approx(310)
    assert scaling.gloo_reduce_us(line, 1000, 2) == pytest.approx(310)


def test_more_ranks_never_cost_less() -> None:
    for cost in (scaling.nccl_gather_us, scaling.nccl_reduce_us):
        times = [cost(16384, n) for n in scaling.RANKS]
        assert times == sorted(times)


def test_many_ranks_move_less_with_a_reduction() -> None:
    cost = scaling.nccl_cost(2048, 1024, 16)
    assert not cost.gathers
    assert cost.chosen_us == cost.reduce_us < cost.gather_us


def test_a_resnet50_has_53_norm_layers_that_exchange_twice_each() -> None:
    from torchvision.models import resnet50

    layers = [m for m in resnet50().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    counted = {c: sum(m.num_features == c for m in layers) for c in scaling.RESNET50}
    assert counted == scaling.RESNET50
    assert scaling.resnet50_step_ms(dict.fromkeys(counted, 1000.0)) == 2 * len(layers)


def test_the_exchange_turns_to_reductions_where_the_layer_does() -> None:
    from syncbn.norm.comm.transports.process_group import GATHER_BYTES

    assert scaling.gathers(2048, GATHER_BYTES // 16384, GATHER_BYTES)
    assert not scaling.gathers(2048, GATHER_BYTES // 16384 + 1, GATHER_BYTES)


@pytest.mark.parametrize("case", list(all_cases(((2, 4, 6, 6),))), ids=str)
def test_operands_have_the_layout_and_dtype_they_are_named_by(case: Case) -> None:
    x = case.tensor(requires_grad=True)
    assert x.is_leaf
    assert x.dtype == DTYPES[case.dtype]
    assert x.is_contiguous(memory_format=LAYOUTS[case.layout])
    memory_passes(x.detach(), case.tensor(), fresh=True)()


def test_a_machine_is_named_without_naming_a_user() -> None:
    text = "processor\t: 0\nmodel name\t: Some(R) Fast(TM) CPU @ 3.00GHz\nflags\t: fpu\n"
    model = machine.cpu_model(text)
    assert model == "Some(R) Fast(TM) CPU @ 3.00GHz"
    known = {"date": "2026-01-02", "cpu": model, "cores": 2}
    assert machine.slug(known) == "2026-01-02-some-fast-3-00ghz-2-cores"


TINY = {
    "contenders": ("ours", "ours_sockets", "ours_gloo", "local", "naive"),
    "budget_s": 0.01,
    "shapes": ((2, 3, 4, 4),),
    "layouts": ("channels_last",),
    "dtypes": ("bf16",),
}


def _is_whole(row: dict[str, Any]) -> bool:
    return (row["world_size"], tuple(row["ms"])) == (2, TINY["contenders"]) and all(
        ms > 0 for ms in row["ms"].values()
    )


@pytest.mark.world_size(2)
def test_two_ranks_measure_one_tiny_layer(world_size: int) -> None:
    (row,) = layer.measure(**TINY)
    assert _is_whole(row)


@pytest.mark.slow
def test_processes_of_their_own_measure_one_tiny_layer() -> None:
    (row,) = ranks.run("layer:measure", 2, timeout_s=120, **TINY)
    assert _is_whole(row)


@pytest.mark.slow
def test_two_ranks_measure_each_way_of_an_exchange() -> None:
    (row,) = ranks.run("exchange:measure", 2, timeout_s=120, channels=(4,), budget_s=0.01)
    assert list(row["us"]) == ["shared", "sockets", "gloo", "reduction"]
    assert all(us > 0 for us in row["us"].values())


@pytest.mark.slow
def test_two_ranks_measure_the_service_and_a_loop_by_hand() -> None:
    row = ranks.run("service:measure", 2, timeout_s=120, case="mlp", budget_s=0.01)
    assert row["global_batch"] == 4
    assert list(row["ms"]) == ["by_hand", "service", "service_journal"]
    assert all(ms > 0 for ms in row["ms"].values())


def _service() -> dict[str, Any]:
    ms = {"by_hand": 1.0, "service": 1.02, "service_journal": 1.25}
    times = {"first_step_s": 3.51, "run_s": 4.2, "cpu_s": 5.0}
    return {
        "service": [{"case": "mlp", "global_batch": 4, "ms": ms, "rounds": 9}],
        "ways": [{"case": "mlp", "global_batch": 4, "ms": {"float32": 2.0, "bf16": 1.0}}],
        "start": [{"tracking": "journal", "runs": 2, **times}],
    }


def test_the_services_share_of_the_loop_by_hand_is_shown_with_its_target() -> None:
    shown = "\n".join(page.service_parts(_service()))
    assert "| service | 1.020 | 3922 | 0.980 met |" in shown
    assert "| service, with its journal | 1.250 | 3200 | 0.800 |" in shown
    assert "| bf16 | 1.0 | 0.50 |" in shown
    assert "| journal | 3.5 | 4.2 | 5.0 |" in shown
    slow = _service()
    slow["service"][0]["ms"]["service"] = 2.0
    assert "**0.500 NOT met**" in "\n".join(page.service_parts(slow))


def test_results_from_before_the_service_was_measured_are_shown_without_it() -> None:
    assert "The service" not in page.generated(_results())
    assert "The service" in page.generated(_results() | _service())


def test_a_rank_that_fails_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="layer:nothing"):
        ranks.run("layer:nothing", timeout_s=60)


def test_an_epoch_of_images_is_measured_against_torchvisions(tmp_path: Path) -> None:
    image_folder.write_images(tmp_path, 40)
    (row,) = image_folder.measure(tmp_path, [0], 0.01, batch=8)
    assert (row["loaders"], row["images"], list(row["ms"])) == (0, 40, ["syncbn", "torchvision"])
    ms = row["ms"]
    assert row["times_as_fast"] == pytest.approx(ms["torchvision"] / ms["syncbn"], abs=0.01)


def test_what_saving_costs_is_the_median_ratio_of_pairs_with_its_spread():
    pairs = [
        {
            "alone": {"step_ms": 2.0, "longest_ms": 3.0, "saves": 0},
            "saving": {"step_ms": step_ms, "longest_ms": 9.0, "saves": 1},
        }
        for step_ms in (2.2, 2.0, 2.02)
    ]
    row = checkpoints.summary(pairs)
    assert row["ratio"] == 1.01
    assert row["ratios"] == [1.0, 1.01, 1.1]
    assert row["saves"] == 3
    about = {"case": "mlp", "turn_s": 30.0, "copy_ms": 1.0, "cost_ms": 2.0}
    assert "| mlp | 3 in 3 turns | 30 | 1.0 | 2.0 | 2.02 / 2.00 |" in checkpoints.table(
        [about | row]
    )
