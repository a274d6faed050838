"""A Ray cluster to train on: one that runs, or one of our own for as long as the run takes.

Anyone who can connect to a Ray cluster can run code on it. So a cluster that answers without a token is not used, the
one started here gets a random token that only this process and its children know, and a running cluster is asked, by
one small RPC, whether it answers, whether it wants a token and what it has, before Ray connects to it.
"""

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any

import grpc
import psutil
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RayError

from syncbn.config import RunConfig
from syncbn.errors import InfrastructureError, NotAuthorised, ServiceUnreachable, UsageError
from syncbn.launch.ray_access import require_capacity
from syncbn.launch.ray_watch import ended_without
from syncbn.signals import held_back

PROBE_TIMEOUT_S = 5.0
DISCONNECT_S = 0.3
"""What this process needs to leave a cluster of its own."""
SHUTDOWN_TIMEOUT_S = 5.0


@contextmanager
def connected(cfg: RunConfig, num_ranks: int, address: str | None) -> Iterator[None]:
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
    with _started(runtime_env) if address is None else _joined(address, runtime_env):
        yield


@contextmanager
def _started(runtime_env: dict[str, dict[str, str]]) -> Iterator[None]:
    """A cluster on this machine that leaves nothing behind."""
    folder = tempfile.mkdtemp(prefix="syncbn-", dir="/tmp")  # sockets need a short path
    try:
        with held_back():
            _start(folder, runtime_env)
        yield
    finally:
        _shut_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


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
    servers = [p for p in psutil.Process().children() if _is_in(folder, p)]
    processes = servers + [child for server in servers for child in server.children(recursive=True)]
    killer = Timer(DISCONNECT_S, _kill, [processes])
    killer.start()
    ray.shutdown()
    killer.join()
    psutil.wait_procs(processes, timeout=SHUTDOWN_TIMEOUT_S)


def _is_in(folder: str, process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has ended
        return folder in " ".join(process.cmdline())
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def _joined(address: str, runtime_env: dict[str, dict[str, str]]) -> Iterator[None]:
    """The running cluster at `address`, of which this machine must be a node."""
    with ended_without(address):
        _join(address, runtime_env)
        try:
            yield
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
