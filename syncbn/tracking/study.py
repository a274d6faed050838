"""What of a run, study or sweep goes to MLflow, and when: the functions that the rest of the project calls.

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
from syncbn.tracking.describe import closing_words, sweep_words
from syncbn.tracking.journal import Journal, read_journal
from syncbn.tracking.redact import HIDDEN, redact
from syncbn.tracking.service import probe, store_uri, tracking_uri
from syncbn.tracking.shipper import CLOSE_S, NoShipper, Shipper, Shipping, one_line
from syncbn.tracking.source import RunSource
from syncbn.tracking.update import shorten

LAUNCH = "launch.jsonl"
Swept = Mapping[str, Mapping[str, str]]
"""Of a sweep: name of a trial to its swept keys with their values, as overrides have them."""

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
    """One launch of the study, or of the sweep, in `cfg`: its own record, and with MLflow its run and its trials' runs.

    To be made by the process that starts the workers, before they start; nothing in it waits for MLflow but `finish`.

    Args:
        cfg: the study's, or what a sweep's trials have in common.
        swept: the trials of a sweep; None for a study.
    """

    def __init__(self, cfg: Config, swept: Swept | None = None) -> None:
        self._experiment = cfg.tracking.experiment or cfg.name
        self._swept = swept
        self._launch = begin_launch(cfg, swept)
        self._source = launch_source(cfg.folder, self._experiment, swept)
        self._shipper: Shipper | None = None
        if cfg.tracking.name != "journal":
            uri = tracking_uri(cfg)
            self._shipper = Shipper(lambda: connect(uri), uri, [self._source])

    def follow(self, folders: Iterable[Path]) -> None:
        """Ship the trials in `folders`, `<arm>-<seed>` each, which need not exist yet."""
        if self._shipper is not None:
            for folder in folders:
                self._shipper.add(trial_source(folder, self._experiment, self._source, self._swept))

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


def begin_launch(cfg: Config, swept: Swept | None = None) -> Journal:
    """A new launch record in the folder of the study or sweep, in place of an earlier launch's."""
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
        **({} if swept is None else {"swept": swept}),
    )
    return journal


def launch_source(folder: Path, experiment: str, swept: Swept | None = None) -> RunSource:
    """The launch of the study in `folder`, or of the sweep."""
    kind, verb = ("study", "compare") if swept is None else ("sweep", "sweep")
    return RunSource(
        folder,
        experiment,
        journal=LAUNCH,
        tags={kind: folder.name, "mlflow.source.name": f"syncbn {verb}"},
        artifacts=STUDY_FILES,
        closing_words=closing_words if swept is None else sweep_words,
    )


def trial_source(
    folder: Path, experiment: str, parent: RunSource, swept: Swept | None = None
) -> RunSource:
    """The trial in `folder`, whose name is `<arm>-<seed>`; that of a sweep is tagged with each of its settings."""
    arm, _, seed = folder.name.rpartition("-")
    if swept is None:
        tags = {"arm": arm, "seed": seed, "mlflow.source.name": "syncbn compare"}
    else:
        own = swept.get(folder.name, {})
        overrides = " ".join(f"{key}={text}" for key, text in own.items())
        tags = {f"sweep.{key}": shorten(text) for key, text in own.items()}
        tags |= {"overrides": shorten(overrides), "seed": seed}
        tags |= {"mlflow.source.name": "syncbn sweep"}
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
    config = recorded_start(folder)["config"]
    uri = uri or recorded_uri(folder, config)
    probe(uri)
    sources = sources_in(folder)
    try:
        sink = connect(uri)
        for source in sources:
            source.pump(sink, final=True)
    except Exception as error:
        raise ServiceUnreachable(
            f"MLflow did not take all of {folder}: {one_line(error)}"
        ) from error
    return len(sources)


def sources_in(folder: Path) -> list[RunSource]:
    """What there is to ship in `folder`: a launch and its trials, or one run."""
    start = recorded_start(folder)
    config, swept = start["config"], start.get("swept")
    experiment = config["tracking"]["experiment"]
    if not (folder / LAUNCH).is_file():
        return [run_source(folder, experiment, config["norm"]["name"])]
    experiment = experiment or folder.name
    launch = launch_source(folder, experiment, swept)
    found = sorted(path.parent for path in folder.glob("trials/*/journal.jsonl"))
    trials = [trial for trial in found if swept is None or trial.name in swept]
    return [launch, *(trial_source(trial, experiment, launch, swept) for trial in trials)]


def recorded_start(folder: Path) -> dict[str, Any]:
    """The `start` record of the run or launch in `folder`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = next((p for p in (folder / LAUNCH, folder / "journal.jsonl") if p.is_file()), None)
    try:
        records = read_journal(path) if path else iter(())
        start = next((record for record in records if record.get("event") == "start"), None)
        if start is not None:
            _ = start["config"]["tracking"]["uri"], start["config"]["norm"]["name"], start["time"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged: its start cannot be read ({type(error).__name__}: {error}); the run's summary.json "
            "and checkpoints are not affected"
        ) from error
    if start is None:
        raise UsageError(
            f"{folder} holds no run: give runs/<name>, a folder with a journal.jsonl or a {LAUNCH}"
        )
    return start


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
