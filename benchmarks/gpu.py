"""The layer on a GPU: `python -m benchmarks.gpu RESULT.json`.

One GPU is enough: what is measured is the path of several ranks, forced in an NCCL group of one, against torch's
own synchronised path, forced alike, and against torch's local batch norm. It stands on torch, torchvision and this
project's layer alone, so that it runs from a bare checkout.

Times are taken by CUDA events. As called, a small layer takes as long as its launches; replayed from a CUDA graph, as
its kernels. Torch's synchronised path cannot be replayed: what its kernels take alone is read from the profiler.
"""

import argparse
import datetime
import functools
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules._functions import SyncBatchNorm as TorchsFunction

import syncbn
from benchmarks.cases import SHAPES, Case, Shape, all_cases

Run = Callable[[], object]
DEVICE = torch.autograd.DeviceType.CUDA
ROUNDS = 50
WARM_UPS = 3
PASSES = 8
"""Passes over memory that forward and backward cannot do without: x, x, y; then x, dy, x, dy, dx."""
COPIED_BYTES = 2**30
LARGE: tuple[Shape, ...] = ((64, 256, 56, 56), (64, 64, 112, 112), (256, 1024, 14, 14))
"""103 MB in bfloat16, twice that in float32: beyond any cache."""


class Ours(nn.BatchNorm2d):
    """Our path of several ranks, whatever the size of the group."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of all ranks."""
        return syncbn.sync_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            num_batches_tracked=self.num_batches_tracked,
            process_group=dist.group.WORLD,
        )


class Torchs(nn.BatchNorm2d):
    """Torch's path of several ranks, likewise."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of all ranks."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        buffers = (self.running_mean, self.running_var)
        return TorchsFunction.apply(
            input, self.weight, self.bias, *buffers, self.eps, 0.1, dist.group.WORLD, 1
        )


LAYERS: Mapping[str, type[nn.BatchNorm2d]] = {
    "ours": Ours,
    "torch_sync": Torchs,
    "local": nn.BatchNorm2d,
}


class FusedBlock(nn.Module):
    """relu(norm(x) + residual) in one."""

    def __init__(self, channels: int, residual: Tensor) -> None:
        super().__init__()
        self.norm = Ours(channels)
        self.residual = nn.Parameter(residual)  # a parameter, so that its gradient is computed

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of `x`."""
        norm = self.norm
        buffers, parameters = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
        return syncbn.sync_batch_norm(
            x,
            *buffers,
            *parameters,
            residual=self.residual,
            act="relu",
            num_batches_tracked=norm.num_batches_tracked,
            process_group=dist.group.WORLD,
        )


class Sequence(FusedBlock):
    """The same as norm, add, relu."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of `x`."""
        return torch.relu_(self.norm(x).add_(self.residual))


def interleaved(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median milliseconds of each of `runs`, which take turns in an order shuffled anew each round."""
    for run in runs.values():
        for _ in range(WARM_UPS):
            run()
    order = random.Random(0)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in runs}
    for _ in range(ROUNDS):
        for name in order.sample(list(runs), len(runs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runs[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        n: statistics.median(s.elapsed_time(e) for s, e in pairs) for n, pairs in events.items()
    }


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Run:
    """One pass each way of a layer."""
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def graphed(run: Run) -> Run:
    """`run` as a replay of a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def kernels_ms(run: Run, rounds: int = 10) -> float:
    """Milliseconds of the kernels and copies of a `run` on the device, whatever lies between them."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    spent = (e.self_device_time_total for e in profiler.key_averages() if e.device_type == DEVICE)
    return sum(spent) / rounds / 1e3


def copy_rate() -> float:
    """Bytes a second of a copy on the device, read and written bytes added."""
    source = torch.randn(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (interleaved({"copy": lambda: target.copy_(source)})["copy"] / 1e3)


def layer_row(case: Case, bytes_per_s: float) -> dict[str, Any]:
    """Forward and backward of each layer, as called and as graphs; and how long memory alone would take."""
    x, dy = case.tensor().cuda().requires_grad_(), case.tensor().cuda()
    runs = {
        name: forward_backward(kind(case.shape[1], device="cuda"), x, dy)
        for name, kind in LAYERS.items()
    }
    # torch's synchronised path looks at a value on the host, which a graph cannot hold
    graphs = {name: graphed(runs[name]) for name in ("ours", "local")}
    floor_ms = PASSES * dy.nbytes / bytes_per_s * 1e3
    return {
        **case.row(),
        "called_ms": interleaved(runs),
        "graph_ms": interleaved(graphs),
        "kernels_ms": {name: kernels_ms(run) for name, run in runs.items()},
        "floor_ms": floor_ms,
    }


def fused_row(case: Case) -> dict[str, Any]:
    """relu(norm(x) + residual), fused and in sequence."""
    x, dy = case.tensor().cuda().requires_grad_(), case.tensor().cuda()
    blocks = {"fused": FusedBlock, "sequence": Sequence}
    runs = {
        name: forward_backward(kind(case.shape[1], case.tensor()).cuda(), x, dy)
        for name, kind in blocks.items()
    }
    graphs = {name: graphed(run) for name, run in runs.items()}
    return {**case.row(), "called_ms": interleaved(runs), "graph_ms": interleaved(graphs)}


def network_row(batch: int = 32) -> dict[str, Any]:
    """A training step of a ResNet-50 in bfloat16 autocast and channels_last, with each layer."""
    import torchvision

    images = torch.randn(batch, 3, 224, 224, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device="cuda")
    runs = {}
    for name, kind in LAYERS.items():
        network = torchvision.models.resnet50(weights=None)
        runs[name] = step(put(kind, network).cuda(), images, target)
    graphs = {name: graphed(runs[name]) for name in ("ours", "local")}
    called, replayed = interleaved(runs), interleaved(graphs)
    return {"network": "resnet50", "batch": batch, "called_ms": called, "graph_ms": replayed}


def put(kind: type[nn.BatchNorm2d], network: nn.Module) -> nn.Module:
    """`network` with its norm layers of another class, which has the same state."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = kind
    return network.to(memory_format=torch.channels_last)


def step(network: nn.Module, images: Tensor, target: Tensor) -> Run:
    """One training step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        # casts of weights are not kept from step to step, which a graph could not do
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = nn.functional.cross_entropy(network(images), target)
        loss.backward()
        optimizer.step()

    return run


def line(row: Mapping[str, Any]) -> str:
    """A row of results as one line of the table."""
    what = "x".join(map(str, row["shape"])) if "shape" in row else row["network"]
    place = f"{row['layout']} {row['dtype']}" if "shape" in row else f"batch {row['batch']}"
    parts = [f"{what:>14} {place:<18}"]
    for kind in ("called_ms", "graph_ms", "kernels_ms"):
        if kind in row:
            times = "  ".join(f"{name} {ms:.3f}" for name, ms in row[kind].items())
            parts.append(f"{kind.removesuffix('_ms')}: {times} ms")
    if "floor_ms" in row:
        parts.append(f"memory alone: {row['floor_ms']:.3f} ms")
    return "  |  ".join(parts)


def measure(group: ProcessGroup) -> dict[str, Any]:
    """Everything, printed as it comes."""
    import triton

    device = torch.cuda.get_device_properties(0)
    rate = copy_rate()
    print(f"{device.name}, torch {torch.__version__}, copies at {rate / 1e12:.2f} TB/s")
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": rate,
        "world_size": group.size(),
    }
    layer = functools.partial(layer_row, bytes_per_s=rate)
    fused = {"fused": (fused_row, SHAPES), "fused_large": (fused_row, LARGE)}
    sections = {"layers": (layer, SHAPES), "large": (layer, LARGE), **fused}
    for section, (measured, shapes) in sections.items():
        found[section] = []
        for case in all_cases(shapes):
            found[section].append(measured(case))
            print(line(found[section][-1]), flush=True)
    found["network"] = network_row()
    print(line(found["network"]))
    return found


def main() -> None:
    """Measure, and write what was found to the given file."""
    parser = argparse.ArgumentParser(description="Measure the layer on a GPU.")
    parser.add_argument("result", type=Path, help="JSON file to write")
    result = parser.parse_args().result
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("nccl", init_method=rendezvous, rank=0, world_size=1)
        assert dist.group.WORLD is not None
        try:
            result.write_text(json.dumps(measure(dist.group.WORLD), indent=1) + "\n")
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
