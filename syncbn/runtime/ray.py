"""Ranks from Ray Train: torchrun's process group, started by Ray's workers.

Ray sets torchrun's environment variables and opens the process group itself, so a rank here is a rank there; what
is left to do is to name the network interface, which gloo otherwise guesses from the host name and gets wrong as
soon as two nodes are involved.
"""

import os
import socket
from dataclasses import dataclass

import psutil
import ray
import ray.train.torch
import torch
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from syncbn.config import RunConfig
from syncbn.runtime.base import Runtime, Solo
from syncbn.runtime.local import TorchrunRuntime, pick_device


def from_ray(cfg: RunConfig) -> Runtime:
    """The runtime of the calling Ray Train worker, a rank of the process group that Ray opened.

    It leaves the group itself: Ray would close it when all ranks have returned, and those that wait for one that has
    failed would not.

    Raises:
        UsageError: `train.device=cuda` on a worker without a GPU.
    """
    device = pick_device(cfg.train.device, 0)
    if device.type == "cuda":
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    alone = ray.train.get_context().get_world_size() == 1
    return Solo(device) if alone else TorchrunRuntime(device)


@dataclass
class NamedInterfaceConfig(TorchConfig):
    """`TorchConfig` whose workers bind to the interface that owns their node's Ray address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The backend that does so."""
        return NamedInterfaceBackend


class NamedInterfaceBackend(_TorchBackend):
    """Names the interface on each worker, then opens the process group as Ray does."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        """Called by Ray once the workers are up."""
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


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
