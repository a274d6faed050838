"""One run's journal on its way to a tracking service.

Nothing about what was sent is kept beside the journal. The service itself is asked, once, which run belongs to this
journal (a tag names it) and up to which step it has each metric; so shipping again, from another process or after a
crash, finds the same run and sends only what is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from syncbn.tracking.tail import Chunk, Tail
from syncbn.tracking.update import ModelFile, Point, Update, fold

RECORDS_AT_ONCE = 300
"""Journal records sent together: about a thousand points, the most that one request to MLflow may hold."""


@dataclass
class RemoteRun:
    """A run as the tracking service has it."""

    run_id: str
    last_steps: dict[str, int] = field(default_factory=dict)
    """Metric to the last step the service holds."""
    has_params: bool = False
    ended: bool = False


@dataclass(frozen=True)
class RunKey:
    """What a run is found by, and how it is called."""

    experiment: str
    name: str
    journal_id: str
    """The run's folder and the time of its journal's first record: another journal, another run."""
    parent_id: str | None = None
    began_ms: int = 0


class RunGone(Exception):
    """The service no longer has the run: its journal is to be sent anew."""


class Sink(Protocol):
    """A tracking service. Every call may raise; every call may be repeated."""

    def open(self, key: RunKey, tags: Mapping[str, str]) -> RemoteRun:
        """The run of `key`, made with `tags` where there is none, and hung under `key.parent_id`."""
        ...

    def send(self, run_id: str, update: Update) -> None:
        """Add what `update` says to the run."""
        ...

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        """Add `file` to the run's artifacts, in `folder`."""
        ...

    def log_model(self, run_id: str, file: Path, model: ModelFile) -> None:
        """Make `file` a model of the run, and a version of a registered one, where it is neither yet."""
        ...

    def abandon(self, experiment: str, journal_id: str) -> None:
        """Mark the run of `journal_id` and its children as killed, where they still count as running."""
        ...


class RunSource:
    """A run's folder, sent to a sink a part at a time.

    Args:
        folder: the run's folder.
        experiment: the experiment its run belongs to.
        journal: name of the journal in `folder`.
        parent: the run that this one hangs under; it must be pumped first.
        tags: said of the run when it is made.
        artifacts: glob patterns of files in `folder` that are uploaded at the end.
        closing_words: gives what is said of the run at the end, from its folder and a time in milliseconds.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        *,
        journal: str = "journal.jsonl",
        parent: "RunSource | None" = None,
        tags: Mapping[str, str] | None = None,
        artifacts: tuple[str, ...] = (),
        closing_words: Callable[[Path, int], Update] | None = None,
    ) -> None:
        self.folder = folder
        self._experiment = experiment
        self._tail = Tail(folder / journal)
        self._parent = parent
        self._tags = dict(tags or {})
        self._artifacts = artifacts
        self._closing_words = closing_words
        self.remote: RemoteRun | None = None
        self._first: Mapping[str, Any] = {}
        self._unsure = False
        self._model: ModelFile | None = None
        self.last_ms = 0
        self.complete = False

    def pump(self, sink: Sink, final: bool = False) -> None:
        """Send what is new; with `final` also the artifacts, and the run's end where its journal has none."""
        try:
            while self._tail.has_new(chunk := self._tail.read(RECORDS_AT_ONCE)):
                self._pump_chunk(sink, chunk)
            if final and self.remote is not None:
                self._finish(sink, self.remote)
        except RunGone:
            self.remote = None
            self._tail.restart()
            raise
        self.complete = final

    def _pump_chunk(self, sink: Sink, chunk: Chunk) -> None:
        if chunk.records:
            if self.remote is None or chunk.starts_over:
                self._end_open_run(sink)
                self._first = chunk.records[0]
                self._model = None
                self.remote = self._open(sink, self._first)
            elif (
                self._unsure
            ):  # what was sent last may have been taken: the service is asked how far it is
                self.remote = self._open(sink, self._first)
            self._send(sink, self.remote, fold(chunk.records))
            self.last_ms = int(chunk.records[-1].get("time", 0) * 1000)
        self._tail.done(chunk)

    def num_unsent(self) -> int:
        """Journal records that the sink has not taken yet."""
        return self._tail.num_left()

    def _open(self, sink: Sink, first: Mapping[str, Any]) -> RemoteRun:
        began = float(first.get("time", 0))
        parent = self._parent.remote if self._parent else None
        if first.get("supersedes") is not None:
            sink.abandon(self._experiment, self._journal_id(first["supersedes"]))
        key = RunKey(
            experiment=self._experiment,
            name=self.folder.name,
            journal_id=self._journal_id(began),
            parent_id=parent.run_id if parent else None,
            began_ms=int(began * 1000),
        )
        return sink.open(key, self._tags)

    def _journal_id(self, began: float) -> str:
        return f"{self.folder.name}@{began!r}"

    def _send(self, sink: Sink, remote: RemoteRun, update: Update) -> None:
        update.points = unseen(update.points, remote.last_steps)
        if remote.has_params:
            update.params = {}
        self._unsure = True
        sink.send(remote.run_id, update)
        self._unsure = False
        for point in update.points:
            remote.last_steps[point.key] = max(point.step, remote.last_steps.get(point.key, -1))
        self._model = update.model or self._model
        remote.has_params = remote.has_params or bool(update.params)
        if update.status is not None:
            remote.ended = update.status != "RUNNING"

    def _finish(self, sink: Sink, remote: RemoteRun) -> None:
        for pattern in self._artifacts:
            for file in sorted(self.folder.glob(pattern)):
                within = file.parent.relative_to(self.folder).as_posix()
                sink.upload(remote.run_id, file, None if within == "." else within)
        if self._closing_words is not None:
            self._send(sink, remote, self._closing_words(self.folder, self.last_ms))
        self._end_open_run(sink)
        if self._model is not None and (file := self.folder / self._model.file).is_file():
            sink.log_model(remote.run_id, file, self._model)

    def _end_open_run(self, sink: Sink) -> None:
        """A run whose journal stopped without an `end`, or was begun anew, was killed."""
        if self.remote is not None and not self.remote.ended:
            sink.send(self.remote.run_id, Update(status="KILLED", time_ms=self.last_ms))
            self.remote.ended = True


def unseen(points: list[Point], last_steps: Mapping[str, int]) -> list[Point]:
    """The `points` beyond the last step that the service holds of their metric."""
    return [point for point in points if point.step > last_steps.get(point.key, -1)]
