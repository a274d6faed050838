"""A rank's process on Ray made one of torchrun's: the same variables, from where on a rank there is a rank here.

What Ray adds is the name of the network interface, which gloo otherwise guesses from the host name and gets wrong as
soon as two nodes are involved.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import ray


@dataclass(frozen=True)
class Location:
    """Where a worker of Ray's runs: its node, and the GPUs reserved for it there."""

    node: str
    gpus: tuple[str, ...]


def this_location() -> Location:
    """That of the calling worker."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return Location(context.get_node_id(), tuple(map(str, gpus)))


def in_order_of_ranks(locations: Mapping[int, Location]) -> list[int]:
    """The numbers of `locations` in the order of ranks: node by node, the first worker's first, then by GPU."""
    nodes = list(dict.fromkeys(locations[number].node for number in sorted(locations)))
    return sorted(
        locations,
        key=lambda number: (nodes.index(locations[number].node), locations[number].gpus, number),
    )


def environments(locations: list[Location], address: str, port: int) -> list[dict[str, str]]:
    """Torchrun's variables of each rank, for `locations` in the order of ranks, whose store is at `address` and `port`.

    The store is not rank 0's, as it is not under torchrun's agent: what a rank failed of can be read whichever died
    or was stopped.

    A rank sees the GPUs of all ranks of its node, for NCCL to connect them directly: the first of each rank in the
    order of ranks, so that LOCAL_RANK is the number of its own, then others. A rank alone needs no group.
    """
    if len(locations) == 1:
        return [{}]
    nodes = list(dict.fromkeys(location.node for location in locations))
    found = []
    for rank, location in enumerate(locations):
        local = [other for other in locations if other.node == location.node]
        variables = {
            "RANK": rank,
            "WORLD_SIZE": len(locations),
            "LOCAL_RANK": sum(other.node == location.node for other in locations[:rank]),
            "LOCAL_WORLD_SIZE": len(local),
            "GROUP_RANK": nodes.index(location.node),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        if location.gpus:
            others = [gpu for other in local for gpu in other.gpus[1:]]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join([*(o.gpus[0] for o in local), *others])
        found.append({name: str(value) for name, value in variables.items()})
    return found


def name_interface() -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, unless set, to the interface of this node's Ray address."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface that owns the IP `address`, or None where none of this machine does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(
            a.address == address and a.family in (socket.AF_INET, socket.AF_INET6)
            for a in addresses
        ):
            return name
    return None
