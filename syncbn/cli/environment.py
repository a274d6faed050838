"""What the environment says of a run: its world (torchrun, Slurm, MPI) and MLflow's own variables.

Each is used, or refused with what to do; none is passed over without a word.
"""

import re
from collections.abc import Mapping, Sequence

from syncbn.checks import TRACKING_URIS, is_tracking_uri
from syncbn.config import RunConfig, TrackingConfig
from syncbn.errors import UsageError

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in each of its processes, and so must who sets one of them by hand."""

_OTHER_STARTERS = (
    ("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_STEP_ID"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_RANK", ("PMI_SIZE",), "PMI_RANK"),
    ("mpirun", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_RANK"),
)
"""Program, its variables for the rank and for the number of tasks, and the one that a task of it has for certain.

A batch script of Slurm has SLURM_PROCID=0 and SLURM_NTASKS too, where srun has started nothing."""


def world_size(environ: Mapping[str, str]) -> int | None:
    """The world size that torchrun set, or None where this process is to start its own ranks.

    Raises:
        UsageError: variables of torchrun that are missing or out of range, or several tasks of Slurm or MPI
            without them.
    """
    if not {"WORLD_SIZE", "RANK"} & set(environ):
        _refuse_other_starters(environ)
        return None
    missing = [name for name in _OF_TORCHRUN if name not in environ]
    if missing:
        given = next(name for name in ("WORLD_SIZE", "RANK") if name in environ)
        raise UsageError(
            f"{given}={environ[given]} is set without {', '.join(missing)}: torchrun sets all of them; start ranks "
            f"with torchrun, or unset {given} and give launcher.num_workers"
        )
    size = _whole("WORLD_SIZE", environ, 1)
    _whole("RANK", environ, 0, size - 1, "WORLD_SIZE - 1 = ")
    _whole("MASTER_PORT", environ, 1, 65535)
    if "LOCAL_RANK" in environ:
        _whole("LOCAL_RANK", environ, 0)
    return size


def refuse_other_size(overrides: Sequence[str], size: int) -> None:
    """Raise `UsageError` where the last setting of `launcher.num_workers` is not the world size that torchrun set."""
    given = [o for o in overrides if o.startswith("launcher.num_workers=")]
    if given and given[-1] != f"launcher.num_workers={size}":
        raise UsageError(
            f"{given[-1]} and WORLD_SIZE={size} in the environment disagree: leave {given[-1]} out where torchrun "
            "starts the ranks, else unset WORLD_SIZE"
        )


def use_mlflow_variables(configs: Sequence[RunConfig], environ: Mapping[str, str]) -> None:
    """Let MLflow's variables stand for `tracking.uri` and `tracking.experiment` where `configs` do not set these.

    Raises:
        UsageError: a URI that cannot be used, or a variable that names a run or an experiment by its number.
    """
    for cfg in configs:
        if cfg.tracking.name == "mlflow":
            _use(cfg.tracking, environ)


def of_mlflow(environ: Mapping[str, str]) -> dict[str, str]:
    """MLflow's variables alone, without those of a world."""
    return {name: value for name, value in environ.items() if name.startswith("MLFLOW_")}


def _use(tracking: TrackingConfig, environ: Mapping[str, str]) -> None:
    for name, instead in (
        ("MLFLOW_RUN_ID", "each run has a run of its own in MLflow, which the same command continues"),
        ("MLFLOW_EXPERIMENT_ID", "an experiment is named, by tracking.experiment or MLFLOW_EXPERIMENT_NAME"),
    ):  # fmt: skip
        if environ.get(name):
            raise UsageError(f"{name}={environ[name]} is not allowed: {instead}; unset it")
    uri = environ.get("MLFLOW_TRACKING_URI")
    if uri and tracking.uri is None:
        if not is_tracking_uri(uri):
            raise UsageError(
                f"MLFLOW_TRACKING_URI={uri!r} is not allowed: {TRACKING_URIS}; unset it, or give tracking.uri"
            )
        tracking.uri = uri
    if tracking.experiment is None:
        tracking.experiment = environ.get("MLFLOW_EXPERIMENT_NAME") or None


def _refuse_other_starters(environ: Mapping[str, str]) -> None:
    """Raise `UsageError` where this process is one of several tasks that Slurm or MPI started."""
    for program, rank, sizes, mark in _OTHER_STARTERS:
        size = next((environ[name] for name in sizes if name in environ), "1")
        is_task = mark in environ or environ.get(rank, "0") != "0"
        if is_task and size.isdigit() and int(size) > 1:
            raise UsageError(
                f"{program} started {size} tasks ({rank}={environ.get(rank)}), and each would be the whole run: have "
                f"it start one task a node, with launcher.num_workers=N on one node or torchrun --nnodes on several, "
                f"or set {', '.join(_OF_TORCHRUN)} in each task"
            )


def _whole(
    name: str, environ: Mapping[str, str], least: int, most: int | None = None, said: str = ""
) -> int:
    """The whole number in a variable, in its range."""
    text = environ[name]
    number = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
    allowed = (
        f"a whole number >= {least}"
        if most is None
        else f"a whole number from {least} to {said}{most}"
    )
    if number is None or number < least or (most is not None and number > most):
        raise UsageError(f"{name}={text} is not allowed: {allowed}")
    return number
