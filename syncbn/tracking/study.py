"""What of a run or study goes to MLflow, and when: the functions that the rest of the project calls.

A launch of a study keeps a journal of its own (`launch.jsonl`), so that the parent run is shipped by the same means as
its trials, at once or later. A trial finished by an earlier launch keeps its MLflow run and moves under the parent of
the latest launch, whose figures show it; the earlier parent keeps its own figures and report.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from syncbn.config import Config, RunConfig
from syncbn.errors import ServiceUnreachable, UsageError
from syncbn.tracking.connect import connect
from syncbn.tracking.describe import closing_words
from syncbn.tracking.journal import Journal, read_journal
from syncbn.tracking.redact import HIDDEN, redact
from syncbn.tracking.service import probe, store_uri, tracking_uri
from syncbn.tracking.shipper import CLOSE_S, NoShipper, Shipper, Shipping, one_line
from syncbn.tracking.source import RunSource

LAUNCH = "launch.jsonl"
STUDY_FILES = ("figures/*.png", "report.html", "report.md", "summary.json", "metrics.parquet")


def start_shipping(cfg: RunConfig, journal: Path) -> Shipping:
    """Follow `journal`, that of a single run, to MLflow; to nowhere with `tracking=journal`. Returns at once."""
    if cfg.tracking.name == "journal":
        return NoShipper()
    uri = tracking_uri(cfg)
    source = run_source(journal.parent, cfg.tracking.experiment, cfg.norm.name)
    return Shipper(lambda: connect(uri), uri, [source])


def run_source(folder: Path, experiment: str | None, arm: str) -> RunSource:
    """The single run in `folder`, whose norm is `arm`."""
    tags = {"arm": arm, "mlflow.source.name": "syncbn train"}
    return RunSource(folder, experiment or "runs", tags=tags, artifacts=("summary.json",))


class StudyTracker:
    """One launch of the study in `cfg`: its own record, and with MLflow its run and its trials' runs.

    To be made by the process that starts the workers, before they start; nothing in it waits for MLflow but `finish`.
    """

    def __init__(self, cfg: Config) -> None:
        self._experiment = cfg.tracking.experiment or cfg.name
        self._launch = begin_launch(cfg)
        self._source = study_source(cfg.folder, self._experiment)
        self._shipper: Shipper | None = None
        if cfg.tracking.name != "journal":
            uri = tracking_uri(cfg)
            self._shipper = Shipper(lambda: connect(uri), uri, [self._source])

    def follow(self, folders: Iterable[Path]) -> None:
        """Ship the trials in `folders`, `<arm>-<seed>` each, which need not exist yet."""
        if self._shipper is not None:
            for folder in folders:
                self._shipper.add(trial_source(folder, self._experiment, self._source))

    def finish(
        self, status: str = "finished", error: str | None = None, timeout_s: float = CLOSE_S
    ) -> int:
        """Ship the rest, with figures and report where they are written, waiting at most `timeout_s` seconds.

        Trials without an `end` in their journal are marked as killed.

        Args:
            status: `finished`, `failed` or `stopped`.
            error: what it failed of, in one line.
            timeout_s: seconds.

        Returns:
            How many journal records MLflow does not have yet; where there are some, a warning was logged.
        """
        self._launch.event("end", status=status, error=error)
        self._launch.close()
        return self._shipper.close(timeout_s) if self._shipper is not None else 0


def begin_launch(cfg: Config) -> Journal:
    """A new launch record in the study's folder, in place of an earlier launch's."""
    path = cfg.folder / LAUNCH
    earlier = list(read_journal(path)) if path.exists() else []
    path.unlink(missing_ok=True)
    journal = Journal(path)
    study = cfg.study
    journal.event(
        "start",
        config=redact(asdict(cfg)),
        supersedes=earlier[0]["time"] if earlier else None,
        question=study.question if study else "",
        arms=", ".join(study.arms) if study else "",
        seeds=", ".join(map(str, study.seeds)) if study else "",
        attempt=(earlier[0].get("attempt", 1) + 1) if earlier else 1,
        world_size=cfg.launcher.num_workers,
    )
    return journal


def study_source(folder: Path, experiment: str) -> RunSource:
    """The launch of the study in `folder`."""
    return RunSource(
        folder,
        experiment,
        journal=LAUNCH,
        tags={"study": folder.name, "mlflow.source.name": "syncbn compare"},
        artifacts=STUDY_FILES,
        closing_words=closing_words,
    )


def trial_source(folder: Path, experiment: str, parent: RunSource) -> RunSource:
    """The trial in `folder`, whose name is `<arm>-<seed>`."""
    arm, _, seed = folder.name.rpartition("-")
    tags = {"arm": arm, "seed": seed, "mlflow.source.name": "syncbn compare"}
    return RunSource(folder, experiment, parent=parent, tags=tags)


def ship(folder: Path, uri: str | None = None) -> int:
    """Send all that MLflow lacks of the run or study in `folder`, waiting for it; a second time changes nothing.

    A run whose journal has no `end` is marked as killed; should it still be going on, its own end corrects that.

    Args:
        folder: `runs/<name>`; a trial's folder stands for its whole study.
        uri: the tracking URI; None means the one that the run was started with.

    Returns:
        The number of runs sent.

    Raises:
        UsageError: no journal in `folder`, or its URI held a password, which was not recorded.
        ServiceUnreachable: MLflow does not answer, or stopped answering on the way.
        NotAuthorised: MLflow refuses this user.
    """
    if (folder.parent.parent / LAUNCH).is_file():
        folder = folder.parent.parent
    config = recorded_config(folder)
    uri = uri or recorded_uri(folder, config)
    probe(uri)
    sources = sources_in(folder, config)
    try:
        sink = connect(uri)
        for source in sources:
            source.pump(sink, final=True)
    except Exception as error:
        raise ServiceUnreachable(
            f"MLflow did not take all of {folder}: {one_line(error)}"
        ) from error
    return len(sources)


def sources_in(folder: Path, config: Mapping[str, Any]) -> list[RunSource]:
    """What there is to ship in `folder`: a launch and its trials, or one run."""
    experiment = config["tracking"]["experiment"]
    if not (folder / LAUNCH).is_file():
        return [run_source(folder, experiment, config["norm"]["name"])]
    experiment = experiment or folder.name
    study = study_source(folder, experiment)
    trials = sorted(path.parent for path in folder.glob("trials/*/journal.jsonl"))
    return [study, *(trial_source(trial, experiment, study) for trial in trials)]


def recorded_config(folder: Path) -> dict[str, Any]:
    """The config in the `start` record of the run or launch in `folder`."""
    path = next((p for p in (folder / LAUNCH, folder / "journal.jsonl") if p.is_file()), None)
    records = read_journal(path) if path else iter(())
    start = next((record for record in records if record.get("event") == "start"), None)
    if start is None:
        raise UsageError(
            f"{folder} holds no run: give runs/<name>, a folder with a journal.jsonl or a {LAUNCH}"
        )
    return start["config"]


def recorded_uri(folder: Path, config: dict[str, Any]) -> str:
    """The tracking URI that `config` names, or the store beside `folder`."""
    uri = config["tracking"]["uri"]
    if uri is None:
        return store_uri(folder.parent)
    if HIDDEN in uri:
        raise UsageError(
            f"the tracking URI {uri} was recorded without its password: give the whole URI"
        )
    return uri
