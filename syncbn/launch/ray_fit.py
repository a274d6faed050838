"""One worker group of Ray Train, from start to the outcome of its ranks.

Kept apart from `ray_train` because importing Ray Train takes seconds, and a cluster that is out of reach or too
small should be reported before that. What a rank fails of crosses back as a message and an exit code, since the
rank's own exception may not survive pickling.
"""

import secrets
import shutil
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from syncbn.config import Config
from syncbn.errors import (
    InfrastructureError,
    RankFailed,
    SyncbnError,
    exit_code,
    in_words,
    of_rank,
)
from syncbn.extensions import load_extensions
from syncbn.launch.outcomes import LOST, kind
from syncbn.launch.ray_progress import told
from syncbn.launch.ray_stop import signals_written_to, stopping_on
from syncbn.runtime.base import Runtime
from syncbn.runtime.causes import cause_told
from syncbn.runtime.ray import NamedInterfaceConfig, from_ray

LINGER_S = 3.5
"""How long a rank that failed, other than 0, waits before Ray learns of it and kills the others: rank 0 finds the cause
and writes how the run ended, after 3 s over gloo."""

Work = Callable[[Any, Runtime], Any]
"""What every rank does: `run_rank`, or `run_trials` with its wave."""


def fit(cfg: Config, work: Work, num_ranks: int, progress: Callable[[], str]) -> Any:
    """Let `num_ranks` ranks do `work`; return what rank 0's returned.

    Meanwhile what `progress` gives is said on stderr, where `train.progress` wants it.

    The signals of `STOPPING` ask the ranks to save a checkpoint and stop; a second one ends this process at once.

    Raises:
        RankFailed: a rank failed or was stopped; its message and exit code.
        InfrastructureError: a worker or its node died, or the cluster's head.
    """
    cfg = _with_absolute_paths(cfg)
    storage = cfg.folder / f".ray-{secrets.token_hex(4)}"
    storage.mkdir(parents=True)
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"cfg": cfg, "work": work, "stop_file": storage / "stop"},
        torch_config=_torch_config(cfg),
        scaling_config=_scaling(cfg, num_ranks),
        run_config=_run_config(storage),
    )
    try:
        with signals_written_to(storage / "stop"), told(progress, cfg.train.progress):
            return _in_a_thread(trainer.fit).return_value
    except TrainingFailedError as error:
        raise cause(error) from error
    except RayActorError as error:  # of the trainer's own controller
        raise InfrastructureError(
            f"the cluster was lost ({_first_line(error)}): start it again to continue from its checkpoint"
        ) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _in_a_thread(function: Callable[[], Any]) -> Any:
    """`function()`, away from the main thread, where Ray Train would take SIGINT for itself."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _rank(config: dict[str, Any]) -> Any:
    """What each worker runs."""
    cfg: Config = config["cfg"]
    try:
        load_extensions(cfg.extensions)
        runtime = from_ray(cfg)
        with closing(runtime), stopping_on(config["stop_file"]), cause_told(runtime):
            return config["work"](cfg, runtime)
    except (Exception, SystemExit) as error:
        if of_rank(error) and not isinstance(error, RankFailed):
            time.sleep(LINGER_S)
        details = getattr(error, "details", "") or traceback.format_exc()
        raise RankFailed(in_words(error), exit_code(error), details, of_rank(error)) from None


def cause(error: TrainingFailedError) -> SyncbnError:
    """The failure behind `error`: that of the rank to be reported (see `outcomes`), else the death of a worker."""
    failures = sorted(getattr(error, "worker_failures", {}).items())
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures}
    heard = [failure for failure in causes.values() if isinstance(failure, RankFailed)]
    killed = {rank: f for rank, f in causes.items() if not isinstance(f, RankFailed)}
    heard.sort(key=lambda failure: kind(failure.exit_code))
    if heard and (kind(heard[0].exit_code) < LOST or not killed):
        return heard[0]
    dead = ", ".join(f"rank {rank}" for rank in killed) or "the worker group"
    reason = next(iter(killed.values()), getattr(error, "controller_failure", error))
    return InfrastructureError(
        f"{dead} died ({_first_line(reason)}): start it again to continue from its checkpoint"
    )


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def _run_config(storage: Path) -> RunConfig:
    """No restarts of Ray's own, under a name that no earlier attempt has used."""
    return RunConfig(
        name=storage.name,
        storage_path=str(storage.parent),
        failure_config=FailureConfig(
            max_failures=0, controller_failure_limit=0, max_preemption_failures=0
        ),
        logging_config=LoggingConfig(log_level="ERROR"),
    )


def _torch_config(cfg: Config) -> NamedInterfaceConfig:
    backend = "nccl" if cfg.launcher.gpus_per_worker and cfg.train.device != "cpu" else "gloo"
    return NamedInterfaceConfig(backend=backend, timeout_s=max(1, round(cfg.launcher.timeout_s)))


def _scaling(cfg: Config, num_ranks: int) -> ScalingConfig:
    each = {"CPU": float(cfg.launcher.cpus_per_worker)}
    if cfg.launcher.gpus_per_worker:
        each["GPU"] = float(cfg.launcher.gpus_per_worker)
    return ScalingConfig(num_workers=num_ranks, use_gpu="GPU" in each, resources_per_worker=each)


def _with_absolute_paths(cfg: Config) -> Config:
    """`cfg` with folders that mean the same to a worker, whose working folder is another."""
    root = str(Path(cfg.data.root).resolve())
    return replace(
        cfg, runs_dir=str(Path(cfg.runs_dir).resolve()), data=replace(cfg.data, root=root)
    )
