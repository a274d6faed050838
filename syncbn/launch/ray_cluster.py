"""A Ray cluster to train on: one that runs, or one of our own for as long as the run takes.

Anyone who can connect to a Ray cluster can run code on it. So a cluster that answers without a token is not used, the
one started here gets a random token that only this process and its children know, and a running cluster is asked, by
one small RPC, whether it answers, whether it wants a token and what it has, before Ray connects to it.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

import grpc
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RayError

from syncbn.config import RunConfig
from syncbn.errors import (
    START_AGAIN,
    InfrastructureError,
    NotAuthorised,
    ServiceUnreachable,
    UsageError,
)
from syncbn.launch.ray_access import require_capacity
from syncbn.launch.ray_servers import Servers, own_servers
from syncbn.launch.ray_watch import ended_without

PROBE_TIMEOUT_S = 5.0
START_S = 60.0
"""How long the servers of a cluster of our own may take to start."""


class Cluster:
    """A running cluster that this process has joined."""

    def require_alive(self) -> None:
        """Raise `InfrastructureError` where it is known to have died; `ray_watch` finds out of one that was joined."""

    def renew(self) -> None:
        """Take the place of a cluster that has died."""


class OwnCluster(Cluster):
    """A cluster on this machine that leaves nothing behind; a context manager."""

    def __init__(self) -> None:
        self._servers: Servers | None = None

    def __enter__(self) -> Self:
        servers = self._servers = own_servers()
        try:
            _start(servers)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        servers, self._servers = self._servers, None
        if servers is not None:
            ray.shutdown()
            servers.end()

    def require_alive(self) -> None:
        """Raise `InfrastructureError` where a server of it has died: Ray notices after a minute, and ends us then.

        Its other processes, ranks among them, would go on for as long, and are ended.
        """
        dead = [] if self._servers is None else self._servers.dead()
        if dead and self._servers is not None:
            self._servers.end_processes()
            raise InfrastructureError(f"{dead[0]} of this launch's own cluster died: {START_AGAIN}")

    def renew(self) -> None:
        """Start another where this one has died."""
        try:
            self.require_alive()
        except InfrastructureError:
            self._stop()
            self.__enter__()


@contextmanager
def connected(cfg: RunConfig, num_ranks: int, address: str | None) -> Iterator[Cluster]:
    """Ray with room for `num_ranks`: the running cluster at `address` (host:port), or one for the duration.

    `ray_access.prepare_environment` must have run before this module was imported.

    Raises:
        UsageError: the cluster has too few CPUs or GPUs, or cannot be joined from this machine.
        ServiceUnreachable: nothing answers at the address as a Ray cluster does.
        NotAuthorised: the cluster refuses the token, or asks for none.
        InfrastructureError: one of our own did not start.
    """
    if address is None:
        where, available = "this machine", this_machine(cfg)
    else:
        where = f"the cluster at {address}"
        available = cluster_resources(address, os.environ["RAY_AUTH_TOKEN"])
    require_capacity(cfg, num_ranks, available, where)
    with OwnCluster() if address is None else _joined(cfg, address) as cluster:
        yield cluster


def _start(servers: Servers) -> None:
    """Join the cluster of `servers` as soon as it has a node.

    Raises:
        InfrastructureError: they do not start.
    """
    limit = time.monotonic() + START_S
    while (address := servers.address()) is None or not _has_node(address):
        if time.monotonic() > limit or servers.have_failed():
            raise _not_started(servers.said())
        time.sleep(0.05)
    try:
        ray.init(
            address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise _not_started(str(error)) from error
    servers.dead()  # which of its processes are the servers


def _has_node(address: str) -> bool:
    with suppress(ServiceUnreachable):
        nodes = _ask_for_nodes(address, os.environ["RAY_AUTH_TOKEN"])
        return nodes is not None and any(n.state == n.ALIVE for n in nodes.node_info_list)
    return False


def _not_started(said: str) -> InfrastructureError:
    return InfrastructureError(
        f"Ray did not start on this machine ({' '.join(said.split())[-300:]}): it has {START_S:g} s for it, which may "
        "not be enough on a busy one; the same command may succeed"
    )


@contextmanager
def _joined(cfg: RunConfig, address: str) -> Iterator[Cluster]:
    """The running cluster at `address`, of which this machine must be a node."""
    with ended_without(address):
        _join(address, cfg.train.num_threads)
        try:
            yield Cluster()
        finally:
            ray.shutdown()


def _join(address: str, num_threads: int) -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    try:
        ray.init(
            address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": threads},
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the cluster at {address}: {error}") from error
    except ConnectionError as error:
        raise ServiceUnreachable(f"cannot join the cluster at {address}: {error}") from error


def this_machine(cfg: RunConfig) -> dict[str, float]:
    """CPUs this process may use and, where the run asks for any, GPUs."""
    gpus = 0
    if cfg.launcher.gpus_per_worker:
        import torch

        gpus = torch.cuda.device_count()
    return {"CPU": len(os.sched_getaffinity(0)), "GPU": gpus}


def cluster_resources(address: str, token: str) -> Mapping[str, float]:
    """What the live nodes of the cluster at `address` have together, e.g. {"CPU": 8.0, "GPU": 2.0}.

    Raises:
        ServiceUnreachable: no Ray cluster answers there.
        NotAuthorised: it refuses `token`, or answers without one.
    """
    if _ask_for_nodes(address, None) is not None:
        raise NotAuthorised(
            f"the cluster at {address} answers without a token, so anyone who can connect can run code there: "
            "start it with RAY_AUTH_MODE=token"
        )
    nodes = _ask_for_nodes(address, token)
    if nodes is None:
        raise NotAuthorised(f"the cluster at {address} refuses this token")
    total: Counter[str] = Counter()
    for node in nodes.node_info_list:
        if node.state == node.ALIVE:
            total.update(dict(node.resources_total))
    return total


def _ask_for_nodes(address: str, token: str | None) -> Any:
    """The cluster's nodes, or None where it does not let this token (or none) in."""
    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        request = gcs_service_pb2.GetAllNodeInfoRequest()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return service.GetAllNodeInfo(request, timeout=PROBE_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return None
            raise ServiceUnreachable(
                f"no Ray cluster answers at {address}: {error.code().name}; give the port that nodes connect to (6379 "
                "by default), not the dashboard's (8265)"
            ) from error
