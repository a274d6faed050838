"""A Ray cluster to train on: one that runs, or one of our own for as long as the run takes.

Anyone who can connect to a Ray cluster can run code on it. So a cluster that answers without a token is not used, the
one started here gets a random token that only this process and its children know, and a running cluster is asked, by
one small RPC, whether it answers, whether it wants a token and what it has, before Ray connects to it.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Timer
from typing import Any, Self

import grpc
import psutil
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
from syncbn.launch import ray_keeper
from syncbn.launch.ray_access import require_capacity
from syncbn.launch.ray_watch import ended_without
from syncbn.signals import held_back

PROBE_TIMEOUT_S = 5.0
DISCONNECT_S = 0.3
"""What this process needs to leave a cluster of its own."""
SERVERS = {"gcs_server": "the head process (GCS)", "raylet": "the node process (raylet)"}
"""Ray's processes without which a cluster of one machine is none, by name."""


class Cluster:
    """A running cluster that this process has joined."""

    def require_alive(self) -> None:
        """Raise `InfrastructureError` where it is known to have died; `ray_watch` finds out of one that was joined."""

    def renew(self) -> None:
        """Take the place of a cluster that has died."""


class OwnCluster(Cluster):
    """A cluster on this machine that leaves nothing behind; a context manager."""

    def __init__(self, runtime_env: dict[str, dict[str, str]]) -> None:
        self._runtime_env = runtime_env
        self._folder = ""
        self._keeper: subprocess.Popen[bytes] | None = None
        self._servers: dict[str, psutil.Process] = {}

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="syncbn-", dir="/tmp")  # sockets need a short path
        with held_back():
            self._keeper = subprocess.Popen(
                [sys.executable, ray_keeper.__file__, self._folder],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            self._open()
        return self

    def _open(self) -> None:
        os.environ[ray_keeper.MARK] = self._folder  # after the keeper has been started without it
        try:
            _start(self._folder, self._runtime_env)
        except BaseException:
            self._stop()
            raise
        children = {p.name(): p for p in psutil.Process().children()}
        self._servers = {name: p for name, p in children.items() if name in SERVERS}

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        _shut_down(self._folder)
        assert self._keeper is not None
        self._keeper.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def require_alive(self) -> None:
        """Raise `InfrastructureError` where a server of it has died: Ray notices after a minute, and ends us then.

        Its other processes, ranks among them, would go on for as long, and are ended.
        """
        dead = [SERVERS[name] for name, p in self._servers.items() if not _lives(p)]
        if dead:
            ray_keeper.end_all(self._folder)
            raise InfrastructureError(f"{dead[0]} of this launch's own cluster died: {START_AGAIN}")

    def renew(self) -> None:
        """Start another where this one has died."""
        try:
            self.require_alive()
        except InfrastructureError:
            self._stop()
            self.__enter__()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
    threads = str(cfg.train.num_threads)
    runtime_env = {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}}
    if address is None:
        where, available = "this machine", this_machine(cfg)
    else:
        where = f"the cluster at {address}"
        available = cluster_resources(address, os.environ["RAY_AUTH_TOKEN"])
    require_capacity(cfg, num_ranks, available, where)
    with OwnCluster(runtime_env) if address is None else _joined(address, runtime_env) as cluster:
        yield cluster


def _start(folder: str, runtime_env: dict[str, dict[str, str]]) -> None:
    try:
        ray.init(
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=runtime_env,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise InfrastructureError(
            f"Ray did not start on this machine ({' '.join(str(error).split())[:300]}): it gives its processes half a "
            "minute, which a busy machine may not; the same command may succeed"
        ) from error


def _shut_down(folder: str) -> None:
    """Disconnect, and end the processes of our cluster in `folder`.

    Ray gives them a second and more to end by themselves, one after the other. Nothing of theirs is needed any more.
    """
    killer = Timer(DISCONNECT_S, ray_keeper.end_all, [folder])
    killer.start()
    ray.shutdown()
    killer.join()


@contextmanager
def _joined(address: str, runtime_env: dict[str, dict[str, str]]) -> Iterator[Cluster]:
    """The running cluster at `address`, of which this machine must be a node."""
    with ended_without(address):
        _join(address, runtime_env)
        try:
            yield Cluster()
        finally:
            ray.shutdown()


def _join(address: str, runtime_env: dict[str, dict[str, str]]) -> None:
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=runtime_env)
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
