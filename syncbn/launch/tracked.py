"""MLflow beside a run: tested once before anything starts, then fed from the journal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncbn.config import RunConfig
from syncbn.tracking import read_journal
from syncbn.tracking.service import probe, tracking_uri
from syncbn.tracking.study import start_shipping


def probe_tracking(cfg: RunConfig) -> None:
    """Find out within 5 s whether the MLflow store of `cfg` can be used.

    Raises:
        UsageError: a URI that MLflow does not know.
        ServiceUnreachable: it does not answer.
        NotAuthorised: it refuses us.
    """
    if cfg.tracking.name == "mlflow":
        probe(tracking_uri(cfg))


@contextmanager
def tracked(cfg: RunConfig) -> Iterator[None]:
    """Ship the journal of the run `cfg` to MLflow while the context lasts.

    A run that fails before it has measured anything is not sent: importing MLflow would hold its message up by seconds.

    Raises:
        SyncbnError: see `probe_tracking`.
    """
    probe_tracking(cfg)
    journal = cfg.folder / "journal.jsonl"
    shipping = start_shipping(cfg, journal)
    try:
        yield
    except BaseException:
        if _has_measured(journal):
            shipping.close()
        else:
            shipping.drop()
        raise
    shipping.close()


def _has_measured(journal: Path) -> bool:
    return journal.is_file() and any("metrics" in record for record in read_journal(journal))
