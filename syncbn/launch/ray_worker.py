"""The process of one rank on Ray: an actor that takes its place among the ranks, and works.

What a rank fails of crosses back as plain values, since the rank's own exception may not survive pickling.
"""

import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from syncbn.config import Config
from syncbn.errors import RankFailed, class_of, exit_code, in_words, of_rank
from syncbn.extensions import load_extensions
from syncbn.runtime import Runtime, from_environment
from syncbn.runtime.causes import cause_told
from syncbn.runtime.ray import Location, name_interface, this_location
from syncbn.train.stopping import ask_to_stop

Work = Callable[[Any, Runtime], Any]
"""What every rank does: `run_rank`, or `run_trials` with its wave."""


class Ended(NamedTuple):
    """How a rank's work ended: with what it returned, or what it failed of."""

    value: Any = None
    failure: RankFailed | None = None


class Worker:
    """A rank's process; `ask_to_stop` is called while `run` runs, so it needs two threads."""

    def location(self) -> Location:
        """Where this worker runs."""
        return this_location()

    def run(self, cfg: Config, work: Work, environment: Mapping[str, str]) -> Ended:
        """Do `work` as the rank that torchrun's variables in `environment` make this process."""
        name_interface()
        os.environ.update(environment)
        try:
            load_extensions(cfg.extensions)
            runtime = from_environment(cfg)
            with closing(runtime), cause_told(runtime):
                return Ended(work(cfg, runtime))
        except (Exception, SystemExit) as error:
            details = getattr(error, "details", "") or traceback.format_exc()
            said = (in_words(error), exit_code(error), details, of_rank(error), class_of(error))
            return Ended(failure=RankFailed(*said))

    def ask_to_stop(self, signal_number: int) -> None:
        """Pass on a signal that the driver received."""
        ask_to_stop(signal_number)
