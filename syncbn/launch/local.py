"""Runs and studies on the ranks of this machine.

Several ranks are started by torchrun's own agent, in this process, as forks (`forks`): it gives them their
environment, hands signals on, and ends the others when one fails. Under torchrun, or for one rank, nothing is started
at all.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from syncbn.compare.study.queue import run_trials
from syncbn.compare.sweep.design import Sweep
from syncbn.config import Config, RunConfig
from syncbn.errors import Stopped
from syncbn.extensions import load_extensions
from syncbn.launch.children import after_signal, failure, reports_in, told
from syncbn.launch.forks import (
    end_forks,
    end_stopped_forks,
    listen,
    start_server,
    take_environment,
    wait_for_server,
)
from syncbn.launch.periodic import periodically
from syncbn.launch.rank import run_rank
from syncbn.launch.restarts import Restarts, healed, healed_waves
from syncbn.launch.study import conduct
from syncbn.launch.sweep import conduct_sweep
from syncbn.runtime import Runtime, from_environment
from syncbn.runtime.causes import cause_told
from syncbn.signals import as_stop, heeded
from syncbn.train import RunSummary
from syncbn.train.record import finished
from syncbn.train.stopping import ended_by_signals, stop_on_signals

Work = Callable[[Any, Runtime], Any]
"""What every rank does with the config and its runtime: `run_rank`, or `run_trials` with its wave."""


LOOK_S = 1.0
"""Seconds between looks for ranks that are stopped."""
_SAID_IN_ONE_LINE = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
"""Loggers of what happens when ranks end, which we report ourselves."""


def launch_run(cfg: RunConfig) -> RunSummary:
    """Train the one run that `cfg` describes and return its summary.

    Raises:
        SyncbnError: the run failed, here or on a rank that was started here.
    """
    if cfg.train.resume:
        finished(cfg)  # refuses what finished with another config, before ranks are started
    if "WORLD_SIZE" in os.environ:
        # torchrun makes the attempts, and ends all ranks once one has: not before rank 0 has recorded why
        with stop_on_signals():
            return _work(cfg, run_rank)
    restarts = Restarts(cfg.launcher.max_restarts)
    return healed(lambda runs: _on_ranks(runs[0], run_rank, cfg.num_ranks), [cfg], restarts)


def launch_study(cfg: Config) -> dict[str, Any]:
    """Run every trial of the study in `cfg`, a group of processes a wave; write and return the study's summary.

    Raises:
        SyncbnError: a trial failed; finished ones are kept.
    """
    return conduct(
        cfg,
        healed_waves(
            cfg, lambda left, processes: _on_ranks(cfg, partial(run_trials, left), processes)
        ),
    )


def launch_sweep(sweep: Sweep) -> dict[str, Any]:
    """Run every trial of `sweep`, as a study's; write and return its summary, those that failed in it.

    Raises:
        SyncbnError: the sweep was stopped, or cannot be run; finished trials are kept.
    """
    cfg, work = sweep.config, partial(run_trials, go_on=True)
    return conduct_sweep(
        sweep,
        healed_waves(cfg, lambda left, processes: _on_ranks(cfg, partial(work, left), processes)),
    )


def _on_ranks(cfg: RunConfig, work: Work, num_ranks: int) -> Any:
    """Let `num_ranks` ranks do `work`; return what rank 0's returned."""
    if num_ranks == 1:
        return _work(cfg, work)
    with stop_on_signals() as stop:
        start_server(cfg.train.num_threads)
        wait_for_server()
    if stop.signal_number:
        raise Stopped(stop.signal_number, saved=False)
    with tempfile.TemporaryDirectory(prefix="syncbn-ranks-") as folder:
        return _under_an_agent(cfg, work, num_ranks, folder)


def _under_an_agent(cfg: RunConfig, work: Work, num_ranks: int, folder: str) -> Any:
    """`work` on `num_ranks` processes of their own, which leave in `folder` how they ended."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id="syncbn",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
        signals_to_handle=",".join([*(number.name for number in heeded()), "SIGQUIT"]),
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    for name in _SAID_IN_ONE_LINE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with periodically(partial(_end_stopped, Path(folder)), LOOK_S):
            return elastic_launch(launch, _rank)(cfg, work, dict(os.environ))[0]
    except SignalException as signalled:
        end_forks(signalled.sigval)
        stop = as_stop(signalled.sigval)
        raise after_signal(stop, reports_in(Path(folder)), num_ranks) from signalled
    except ChildFailedError as failed:
        codes = {rank: one.exitcode for rank, one in failed.failures.items()}
        raise failure(reports_in(Path(folder)), num_ranks, codes) from failed


def _end_stopped(folder: Path) -> None:
    """End ranks that are stopped once another has failed, for want of them perhaps."""
    if any(report["exit_code"] for report in reports_in(folder).values()):
        end_stopped_forks()


def _rank(cfg: RunConfig, work: Work, environ: Mapping[str, str]) -> Any:
    """What each process that the agent starts runs, in `environ`."""
    with told():
        listen()
        take_environment(environ)
        return _work(cfg, work)


def _work(cfg: RunConfig, work: Work) -> Any:
    with ended_by_signals():  # ranks wait here for each other, and one of them may not come
        load_extensions(cfg.extensions)
        runtime = from_environment(cfg)
    try:
        with cause_told(runtime):
            return work(cfg, runtime)
    finally:
        runtime.close()
