"""Ranks on Ray, an actor each, from the places reserved for them to the outcome.

Ray's core gives the processes, and word of their death. Its Train library would keep such a group too, and takes ten
seconds more to start one.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from syncbn.config import Config
from syncbn.errors import START_AGAIN, InfrastructureError, Stopped, SyncbnError
from syncbn.launch.outcomes import LOST, STOPPED, kind
from syncbn.launch.ray_cluster import Cluster
from syncbn.launch.ray_progress import told
from syncbn.launch.ray_worker import Ended, Work, Worker
from syncbn.runtime.ray import environments, in_order_of_ranks
from syncbn.train.stopping import StopRequest, stop_on_signals

LOOK_S = 0.25
"""Seconds between looks for a signal."""
GRACE_S = 10.0
"""How long ranks may go on once one has failed: rank 0 learns the cause and writes how the run ended."""

End = Ended | RayError
"""How a rank ended: by itself, or with its process."""


def fit(
    cfg: Config, work: Work, num_ranks: int, progress: Callable[[], str], cluster: Cluster
) -> Any:
    """Let `num_ranks` ranks do `work`; return what rank 0's returned.

    Meanwhile what `progress` gives is said on stderr, where `train.progress` wants it. A `cluster` that has died is
    replaced first, where it can be.

    The signals of `STOPPING` ask the ranks to save a checkpoint and stop; a second one ends this process at once.

    Raises:
        RankFailed: a rank failed or was stopped; its message and exit code.
        Stopped: a signal came before the ranks had started.
        InfrastructureError: a worker, its node or the cluster died, or there was no room for all of them.
    """
    cfg = _with_absolute_paths(cfg)
    cluster.renew()
    with (
        stop_on_signals() as stop,
        _workers(cfg, num_ranks, look := Look(stop, cluster)) as workers,
    ):
        store = TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False)
        try:
            ranks, variables = _as_ranks(workers, store, look)
        except RayError as error:
            cluster.require_alive()
            raise cause({0: error}) from error
        with told(progress, cfg.train.progress):
            running = [
                rank.run.remote(cfg, work, each)
                for rank, each in zip(ranks, variables, strict=True)
            ]
            ends = _ends(ranks, running, partial(look.ask_to_stop, ranks))
    done = {
        rank: end.value
        for rank, end in ends.items()
        if isinstance(end, Ended) and end.failure is None
    }
    if len(done) < num_ranks:
        cluster.require_alive()
        raise cause(ends)
    return done[0]


@dataclass(frozen=True)
class Look:
    """What ends a wait for Ray: a signal, or the death of the cluster, of which Ray says nothing for a minute."""

    stop: StopRequest
    cluster: Cluster

    def __call__(self) -> None:
        """Raise where there is reason to.

        Raises:
            Stopped: a signal came.
            InfrastructureError: the cluster died.
        """
        self.cluster.require_alive()
        if self.stop.signal_number:
            raise Stopped(self.stop.signal_number, saved=False)

    def ask_to_stop(self, ranks: list[Any]) -> None:
        """Pass a signal on, each time: a rank that still starts does not remember it.

        Raises:
            InfrastructureError: the cluster died.
        """
        self.cluster.require_alive()
        if self.stop.signal_number:
            for rank in ranks:
                rank.ask_to_stop.remote(self.stop.signal_number)


@contextmanager
def _workers(cfg: Config, num_ranks: int, look: Look) -> Iterator[list[Any]]:
    """An actor a rank, all in the places that are reserved for them while the context lasts."""
    each = {"CPU": float(cfg.launcher.cpus_per_worker)}
    if cfg.launcher.gpus_per_worker:
        each["GPU"] = float(cfg.launcher.gpus_per_worker)
    places = placement_group([each] * num_ranks)
    workers: list[Any] = []
    try:
        _wait_for(places, cfg.launcher.start_timeout_s, look)
        for number in range(num_ranks):
            where = PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=number)
            workers.append(
                ray.remote(Worker)
                .options(
                    num_cpus=each["CPU"],
                    num_gpus=each.get("GPU", 0),
                    scheduling_strategy=where,
                    max_concurrency=2,
                )
                .remote()
            )
        yield workers
    finally:
        with suppress(InfrastructureError):
            look.cluster.require_alive()  # of one that died, Ray would wait for an answer
            for worker in workers:
                ray.kill(worker)
            remove_placement_group(places)


def _wait_for(places: PlacementGroup, timeout_s: float, look: Look) -> None:
    limit = time.monotonic() + timeout_s
    while not places.wait(LOOK_S):
        look()
        if time.monotonic() > limit:
            raise InfrastructureError(
                f"the cluster had no room for {places.bundle_count} ranks of {places.bundle_specs[0]} each in "
                f"launcher.start_timeout_s={timeout_s:g}: others use it; the same command may find room later"
            )


def _as_ranks(
    workers: list[Any], store: TCPStore, look: Look
) -> tuple[list[Any], list[dict[str, str]]]:
    """`workers` in the order of ranks, and the variables of each rank."""
    locations = dict(enumerate(_get([worker.location.remote() for worker in workers], look)))
    order = in_order_of_ranks(locations)
    variables = environments([locations[number] for number in order], store.host, store.port)
    return [workers[number] for number in order], variables


def _get(refs: list[Any], look: Look) -> list[Any]:
    """The values of `refs`, unless `look` raises first."""
    while len(ray.wait(refs, num_returns=len(refs), timeout=LOOK_S)[0]) < len(refs):
        look()
    return ray.get(refs)


def _ends(ranks: list[Any], running: list[Any], look: Callable[[], None]) -> dict[int, End]:
    """How each rank ended; those that go on long after one has failed are left out. Meanwhile `look` is called.

    The process of a rank that failed is ended, since the others notice that at once: elsewhere it would exit.
    """
    waiting = {ref: rank for rank, ref in enumerate(running)}
    ends: dict[int, End] = {}
    limit = float("inf")
    while waiting and time.monotonic() < limit:
        look()
        for ref in ray.wait(list(waiting), timeout=LOOK_S)[0]:
            rank = waiting.pop(ref)
            end = ends[rank] = _end_of(ref)
            if _takes_others_along(end):
                ray.kill(ranks[rank])
                limit = min(limit, time.monotonic() + GRACE_S)
    return ends


def _end_of(ref: Any) -> End:
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def _takes_others_along(end: End) -> bool:
    """Whether a rank's end leaves the others without it; ranks that stop do so together."""
    if isinstance(end, RayError):
        return True
    return end.failure is not None and kind(end.failure.exit_code) != STOPPED


def cause(ends: Mapping[int, End]) -> SyncbnError:
    """The failure behind `ends`, by rank: that of the rank to be reported (see `outcomes`), else a worker's death."""
    killed = {rank: end for rank, end in sorted(ends.items()) if isinstance(end, RayError)}
    heard = [
        end.failure for _, end in sorted(ends.items()) if isinstance(end, Ended) and end.failure
    ]
    heard.sort(key=lambda failure: kind(failure.exit_code))
    if heard and (kind(heard[0].exit_code) < LOST or not killed):
        return heard[0]
    dead = ", ".join(str(rank) for rank in killed)
    return InfrastructureError(
        f"rank {dead} died ({_first_line(next(iter(killed.values())))}): {START_AGAIN}"
    )


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def _with_absolute_paths(cfg: Config) -> Config:
    """`cfg` with folders that mean the same to a worker, whose working folder is another."""
    root = str(Path(cfg.data.root).resolve())
    return replace(
        cfg, runs_dir=str(Path(cfg.runs_dir).resolve()), data=replace(cfg.data, root=root)
    )
