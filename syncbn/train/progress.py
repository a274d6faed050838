"""A progress bar on rank 0's terminal; everywhere else, nothing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from syncbn.config import RunConfig


class Advance:
    """Shows that a step is done; without a bar, does nothing."""

    def __init__(self, bar: Progress | None, total: int, description: str) -> None:
        self.bar = bar
        self.task = None if bar is None else bar.add_task(description, total=total)

    def __call__(self, step: int) -> None:
        """Move the bar to `step`."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step)


@contextmanager
def progress(cfg: RunConfig, is_main: bool) -> Iterator[Advance]:
    """A bar on rank 0's terminal, where there is one and the config wants it."""
    if not (is_main and cfg.train.progress and sys.stderr.isatty()):
        yield Advance(None, cfg.train.steps, cfg.name)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield Advance(bar, cfg.train.steps, cfg.name)
