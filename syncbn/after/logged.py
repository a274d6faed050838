"""A finished run's network beside its journal, for MLflow: exported at the end of the run, sent with the journal."""

import logging

import torch

from syncbn.after.export import export
from syncbn.after.find import JOURNAL, Found
from syncbn.after.trained import open_run
from syncbn.config import Config, RunConfig
from syncbn.tracking import Journal, read_journal
from syncbn.tracking.shipper import one_line

MODEL_FILE = "mlflow.pt2"
"""Not the file that `syncbn export` writes, which may be of another checkpoint."""
FIELDS = ("step", "dtype", "input", "output")

log = logging.getLogger("syncbn.after")


def record_model(cfg: RunConfig) -> None:
    """Export the network of the finished run `cfg` to its folder, and say so in its journal; once for each name.

    A network that cannot be exported is left with a warning: the run has finished all the same.
    """
    journal, name = cfg.folder / JOURNAL, cfg.tracking.registered_name
    if any(r.get("event") == "model" and r["registered"] == name for r in read_journal(journal)):
        return
    try:
        run = open_run(Found(cfg.folder, Config(**vars(cfg)), cfg.num_ranks))
        made = export(run, "pt2", cfg.folder / MODEL_FILE)
    except Exception as error:
        log.warning("no model of run %s goes to MLflow: %s", cfg.folder, one_line(error))
        return
    described = {key: made[key] for key in FIELDS}
    tracker = Journal(journal)
    tracker.event(
        "model", file=MODEL_FILE, registered=name, torch=str(torch.__version__), **described
    )
    tracker.close()
