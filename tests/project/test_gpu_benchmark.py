"""The benchmark for a GPU, as far as it goes without one: what it compares gives equal numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks import gpu_page  # noqa: E402
from benchmarks.gpu import FusedBlock, Ours, Sequence, line, put  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so_and_succeeds(tmp_path: Path):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "no CUDA device\n"
    assert not result.exists()


@pytest.mark.world_size(1)
def test_all_contenders_compute_the_same(world_size: int):
    x, residual = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    assert_close(Ours(3)(x), nn.BatchNorm2d(3)(x), 1e-6)
    sequence = Sequence(3, residual)(x)
    assert_close(FusedBlock(3, residual)(x), sequence, 1e-6)
    network = put(Ours, nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert isinstance(network[1], Ours)
    assert network(x).is_contiguous(memory_format=torch.channels_last)


def test_a_row_tells_its_case_and_its_times():
    row = {"shape": [2, 64, 7, 7], "layout": "NCHW", "dtype": "fp32", "graph_ms": {"ours": 0.5}}
    assert " ".join(line(row).split()) == "2x64x7x7 NCHW fp32 | graph: ours 0.500 ms"


def _results() -> dict[str, Any]:
    """Of one shape: ours takes half of torch's time as called, and three quarters of it in bfloat16."""

    def row(shape: list[int], dtype: str, ours: float) -> dict[str, Any]:
        called = {"ours": ours, "torch_sync": 1.0, "local": 0.5}
        graph = {"ours": 0.4, "local": 0.5}
        row = {"shape": shape, "layout": "NCHW", "dtype": dtype, "called_ms": called}
        return {**row, "graph_ms": graph, "kernels_ms": called, "floor_ms": 0.3}

    def fused(dtype: str) -> dict[str, Any]:
        ms = {"fused": 0.5, "sequence": 0.8}
        row = {"shape": [2, 8, 4, 4], "layout": "NCHW", "dtype": dtype}
        return {**row, "called_ms": ms, "graph_ms": ms}

    halves = [fused("fp32"), fused("bf16")]
    step = {"ours": 9.0, "torch_sync": 30.0, "local": 10.0}
    return {
        "date": "2026-01-02",
        "device": "a GPU",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "copy_bytes_per_s": 3e12,
        "layers": [row([2, 8, 4, 4], "fp32", 0.5), row([2, 8, 4, 4], "bf16", 0.8)],
        "large": [row([64, 8, 4, 4], "fp32", 0.5), row([64, 8, 4, 4], "bf16", 0.8)],
        "fused": halves,
        "fused_large": halves,
        "network": {"network": "resnet50", "batch": 32, "called_ms": step, "graph_ms": step},
    }


def test_the_page_says_of_each_bound_whether_it_is_met():
    lines = gpu_page.bounds_table(_results()).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    called = cells["ours / torch SyncBatchNorm, as called"]
    assert called == ["≤ 0.75", "0.500 met", "**0.800 NOT met**", "0.632 met |"]
    assert cells["share of the copy's bandwidth, 103 to 206 MB"][1] == "**0.750 NOT met**"
    assert cells["norm, add, ReLU / fused, as called"][1] == "1.600 met"
    assert cells["ours / torch local, from a graph"][1] == "0.800"


def test_the_page_shows_every_time_that_was_taken():
    text = gpu_page.generated(_results())
    assert "| 64x8x4x4 | 0.800 | 1.000 | 0.500 | 0.400 | 0.500 | 0.800 | 1.000 | 0.500 |" in text
    assert "| from a graph | 9.00 (0.90 of local) | 30.00 (3.00 of local) |" in text


def test_the_docs_quote_the_newest_results():
    page = (ROOT / "docs/performance.md").read_text()
    assert gpu_page.generated(json.loads(gpu_page.newest().read_text())) in page
