"""Runs, studies and sweeps on Ray.

One group of ranks serves a whole wave of a study's trials, because starting one costs more than a trial on digits
takes. Where a worker dies, another group goes on from the run's own checkpoint, on the cluster that is there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from syncbn.compare.study.design import most_processes
from syncbn.compare.sweep.design import Sweep
from syncbn.config import Config, RunConfig
from syncbn.launch.ray_access import prepare_environment
from syncbn.launch.ray_progress import run_progress, study_progress, sweep_progress

if TYPE_CHECKING:
    from syncbn.compare.study.design import Trial
    from syncbn.launch.ray_cluster import Cluster
    from syncbn.train import RunSummary


def launch_run(cfg: Config) -> "RunSummary":
    """Train the one run that `cfg` describes and return its summary.

    Raises:
        SyncbnError: see `prepare_environment`, `ray_cluster.connected` and `ray_ranks.fit`.
    """
    with _ray(cfg, cfg.num_ranks) as cluster:
        from syncbn.launch.rank import run_rank
        from syncbn.launch.ray_ranks import fit
        from syncbn.launch.restarts import Restarts, healed

        def attempt(runs: Sequence[RunConfig]) -> "RunSummary":
            run = cast(Config, runs[0])  # `cfg`, resumed
            return fit(run, run_rank, cfg.num_ranks, partial(run_progress, cfg), cluster)

        return healed(attempt, [cfg], Restarts(cfg.launcher.max_restarts))


def launch_study(cfg: Config) -> dict[str, Any]:
    """Run every trial of the study in `cfg`, a group of ranks a wave; write and return the study's summary.

    Raises:
        SyncbnError: see `prepare_environment`, `ray_cluster.connected` and `ray_ranks.fit`.
    """
    with _ray(cfg, most_processes(cfg)) as cluster:
        from syncbn.compare.study.queue import run_trials
        from syncbn.launch.study import conduct

        return conduct(cfg, _healed_waves(cfg, run_trials, partial(study_progress, cfg), cluster))


def launch_sweep(sweep: Sweep) -> dict[str, Any]:
    """Run every trial of `sweep`, a group of ranks a wave; write and return its summary, those that failed in it.

    Raises:
        SyncbnError: see `prepare_environment`, `ray_cluster.connected` and `launch.sweep.conduct_sweep`.
    """
    cfg = sweep.config
    with _ray(cfg, sweep.most_processes) as cluster:
        from syncbn.compare.study.queue import run_trials
        from syncbn.launch.sweep import conduct_sweep

        work = partial(run_trials, go_on=True)
        return conduct_sweep(
            sweep, _healed_waves(cfg, work, partial(sweep_progress, sweep), cluster)
        )


def _healed_waves(
    cfg: Config, work: Callable[..., None], progress: Callable[[], str], cluster: "Cluster"
) -> "Callable[[Sequence[Trial], int], Any]":
    from syncbn.launch.ray_ranks import fit
    from syncbn.launch.restarts import healed_waves

    def run(left: "Sequence[Trial]", processes: int) -> Any:
        return fit(cfg, partial(work, left), processes, progress, cluster)

    return healed_waves(cfg, run)


@contextmanager
def _ray(cfg: Config, num_ranks: int) -> "Iterator[Cluster]":
    """Ray, set up before it is imported, and connected."""
    address = prepare_environment(cfg)
    from syncbn.launch.ray_cluster import connected
    from syncbn.launch.ray_servers import drop_early

    if address is not None:
        drop_early()
    with connected(cfg, num_ranks, address) as cluster:
        yield cluster
