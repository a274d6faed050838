"""The work of a rank in one run, whichever launcher started it."""

from contextlib import ExitStack

from syncbn.checkpoint import RunLock
from syncbn.config import RunConfig
from syncbn.launch.tracked import tracked
from syncbn.runtime.base import Runtime
from syncbn.train.record import recorded_run
from syncbn.train.summary import RunSummary


def run_rank(cfg: RunConfig, runtime: Runtime) -> RunSummary:
    """Train `cfg`; on rank 0 hold the run's folder, ship its journal to MLflow meanwhile, and its network at the end.

    Raises:
        SyncbnError: see `recorded_run`; `CheckpointError` where another job holds the folder.
    """
    with ExitStack() as stack:
        if runtime.is_main:
            stack.enter_context(RunLock(cfg.folder))
            stack.enter_context(tracked(cfg))
        summary = recorded_run(cfg, runtime)
        if runtime.is_main and cfg.tracking.log_model:
            from syncbn.after.logged import record_model  # torch.export takes a second to import

            record_model(cfg)
        return summary
