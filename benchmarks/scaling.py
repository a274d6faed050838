"""A model, not a measurement: what synchronising costs on more ranks than one machine has.

Times are latency + bytes / bandwidth. For gloo both are fitted to this machine's own two ranks and carried to a ring.
For NCCL they are the assumptions below, in the form and with the LL latencies of NCCL's own cost model
(github.com/NVIDIA/nccl, src/graph/tuning.cc). A gather sends every rank everybody's values, a reduction sums on
the way: the first has fewer steps, the second fewer bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from syncbn.norm.comm.transports.sockets import MESH_RANKS

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GLOO_RANKS = tuple(ranks for ranks in RANKS if ranks > MESH_RANKS)
"""Those that the layer takes through gloo; fewer connect with each other, which is not modelled."""
RESNET50 = {64: 7, 128: 8, 256: 16, 512: 11, 1024: 7, 2048: 4}
"""Norm layers of a ResNet-50, by channels."""

RANKS_PER_HOST = 8
GATHER_BASE_US, RING_HOST_US, RING_NET_US = 3.6, 0.47, 2.7
"""Launch, and a step of a ring inside a host (NVLink) and between hosts, protocol LL."""
REDUCE_BASE_US, TREE_HOST_US, TREE_NET_US = 4.4, 0.52, 5.0
"""The same for a tree."""
SEVERAL_HOSTS = 1.8
"""By how much a step inside a host is slower where there are several."""
HOST_BYTES_PER_US, NET_BYTES_PER_US = 50e3, 5e3
"""Assumed: 200 GB/s inside a host and 20 GB/s a GPU between hosts, of which LL moves a quarter."""


@dataclass(frozen=True)
class Line:
    """microseconds = latency_us + bytes * us_per_byte."""

    latency_us: float
    us_per_byte: float


def fit(num_bytes: Sequence[float], us: Sequence[float]) -> Line:
    """The least-squares line with neither coefficient below 0."""
    n = len(us)
    mean_x, mean_y = sum(num_bytes) / n, sum(us) / n
    spread = sum((x - mean_x) ** 2 for x in num_bytes)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(num_bytes, us, strict=True)) / spread
    slope = max(slope, 0.0)
    return Line(max(mean_y - slope * mean_x, 0.0), slope)


def gloo_gather_us(line: Line, payload_bytes: float, ranks: int) -> float:
    """A ring of W - 1 steps, each of which is what `line` says of two ranks."""
    return (ranks - 1) * (line.latency_us + payload_bytes * line.us_per_byte)


def gloo_reduce_us(line: Line, payload_bytes: float, ranks: int) -> float:
    """A ring of 2 (W - 1) steps with a share of 1 / W each; `line` is fitted to the 2 steps of two ranks."""
    return (ranks - 1) * line.latency_us + 2 * (
        ranks - 1
    ) / ranks * payload_bytes * line.us_per_byte


def nccl_gather_us(payload_bytes: float, ranks: int) -> float:
    """A ring of W - 1 steps that brings every rank (W - 1) payloads."""
    hosts, host_factor, speed = _network(ranks)
    steps = (ranks - hosts) * RING_HOST_US * host_factor + (hosts - 1) * RING_NET_US
    return GATHER_BASE_US + steps + (ranks - 1) * payload_bytes / speed


def nccl_reduce_us(payload_bytes: float, ranks: int) -> float:
    """A tree up and down: the bytes of two payloads whatever the number of ranks."""
    hosts, host_factor, speed = _network(ranks)
    chain = (ranks / hosts - 1) * TREE_HOST_US * host_factor
    return REDUCE_BASE_US + 2 * (chain + log2(hosts) * TREE_NET_US) + 2 * payload_bytes / speed


def _network(ranks: int) -> tuple[int, float, float]:
    """Hosts, the factor on steps inside one, and bytes a microsecond of the slowest link."""
    hosts = -(-ranks // RANKS_PER_HOST)
    return (
        hosts,
        SEVERAL_HOSTS if hosts > 1 else 1.0,
        NET_BYTES_PER_US if hosts > 1 else HOST_BYTES_PER_US,
    )


def gather_bytes(channels: int) -> int:
    """What a rank gives to a gather: mean and M2, or two sums, in float32 (8C; the count adds 8 bytes forward)."""
    return 8 * channels


def reduce_bytes(channels: int) -> int:
    """What a rank gives to a reduction: the same in float64, and the count."""
    return 8 * (2 * channels + 1)


def gathers(channels: int, ranks: int, limit_bytes: int) -> bool:
    """Whether the layer gathers over gloo rather than reduces: it receives at most `limit_bytes`."""
    return ranks * gather_bytes(channels) <= limit_bytes


@dataclass(frozen=True)
class Cost:
    """Modelled microseconds of one exchange either way, and which way the layer goes."""

    gather_us: float
    reduce_us: float
    gathers: bool

    @property
    def chosen_us(self) -> float:
        """Of the way that the layer goes."""
        return self.gather_us if self.gathers else self.reduce_us


def nccl_cost(channels: int, ranks: int, gather_ranks: int) -> Cost:
    """One exchange over NCCL, where up to `gather_ranks` ranks gather."""
    return Cost(
        nccl_gather_us(gather_bytes(channels), ranks),
        nccl_reduce_us(reduce_bytes(channels), ranks),
        ranks <= gather_ranks,
    )


def gloo_cost(gather: Line, reduce: Line, channels: int, ranks: int, limit_bytes: int) -> Cost:
    """One exchange over gloo with the lines fitted to two ranks."""
    return Cost(
        gloo_gather_us(gather, gather_bytes(channels), ranks),
        gloo_reduce_us(reduce, reduce_bytes(channels), ranks),
        gathers(channels, ranks, limit_bytes),
    )


def resnet50_step_ms(costs: dict[int, float]) -> float:
    """Milliseconds of exchanges in a ResNet-50 step, given microseconds of one by channels: two a layer."""
    return sum(2 * num * costs[channels] for channels, num in RESNET50.items()) / 1e3
