"""Runs, studies and sweeps on Ray.

One group of ranks serves a whole wave of a study's trials, because starting one costs more than a trial on digits
takes. A run resumes from its own checkpoint, by the same command, on whichever launcher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from syncbn.compare.study.design import most_processes
from syncbn.compare.sweep.design import Sweep
from syncbn.config import Config
from syncbn.launch.ray_access import prepare_environment
from syncbn.launch.ray_progress import run_progress, study_progress, sweep_progress

if TYPE_CHECKING:
    from syncbn.train import RunSummary


def launch_run(cfg: Config) -> "RunSummary":
    """Train the one run that `cfg` describes and return its summary.

    Raises:
        SyncbnError: see `prepare_environment`, `ray_cluster.connected` and `ray_ranks.fit`.
    """
    with _ray(cfg, cfg.num_ranks):
        from syncbn.launch.rank import run_rank
        from syncbn.launch.ray_ranks import fit

        return fit(cfg, run_rank, cfg.num_ranks, partial(run_progress, cfg))


def launch_study(cfg: Config) -> dict[str, Any]:
    """Run every trial of the study in `cfg`, a group of ranks a wave; write and return the study's summary.

    Raises:
        SyncbnError: see `prepare_environment`, `ray_cluster.connected` and `ray_ranks.fit`.
    """
    with _ray(cfg, most_processes(cfg)):
        from syncbn.compare.study.queue import run_trials
        from syncbn.launch.ray_ranks import fit
        from syncbn.launch.study import conduct

        progress = partial(study_progress, cfg)
        return conduct(
            cfg, lambda wave, processes: fit(cfg, partial(run_trials, wave), processes, progress)
        )


def launch_sweep(sweep: Sweep) -> dict[str, Any]:
    """Run every trial of `sweep`, a group of ranks a wave; write and return its summary, those that failed in it.

    Raises:
        SyncbnError: see `prepare_environment`, `ray_cluster.connected` and `launch.sweep.conduct_sweep`.
    """
    cfg = sweep.config
    with _ray(cfg, sweep.most_processes):
        from syncbn.compare.study.queue import run_trials
        from syncbn.launch.ray_ranks import fit
        from syncbn.launch.sweep import conduct_sweep

        progress = partial(sweep_progress, sweep)
        return conduct_sweep(
            sweep,
            lambda wave, processes: fit(
                cfg, partial(run_trials, wave, go_on=True), processes, progress
            ),
        )


@contextmanager
def _ray(cfg: Config, num_ranks: int) -> Iterator[None]:
    """Ray, set up before it is imported, and connected."""
    address = prepare_environment(cfg)
    from syncbn.launch.ray_cluster import connected

    with connected(cfg, num_ranks, address):
        yield
