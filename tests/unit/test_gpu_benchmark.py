"""The benchmark for a GPU, as far as it goes without one: what it compares gives equal numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_close
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

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
