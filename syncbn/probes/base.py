"""The interface of a probe: it may observe every step, measures at due ones, and concludes at the end.

What a probe sums up over training is its `state_dict`, plain numbers and tensors in lists and dicts, which a checkpoint
saves. An interrupted run so ends with the numbers of one that was not.
"""

from typing import Any

from syncbn.errors import UsageError
from syncbn.probes.view import View


class Probe:
    """One thing that is looked at. A class of its own for each name in `syncbn.config.PROBES`.

    Args:
        view: the run before its first step.

    Raises:
        UsageError: a run in which it cannot look.
    """

    on_all_ranks = False
    """Whether every rank takes part, since collectives are needed; otherwise rank 0 looks, and communicates nothing."""

    def __init__(self, view: View) -> None:
        del view

    def open(self) -> None:
        """Begin to watch, before the first step of an attempt."""

    def close(self) -> None:
        """Watch no more; called however the attempt ends."""

    def watch(self, view: View) -> None:
        """See a step, every one, after its backward pass and before any look at it. It must be quick."""

    def look(self, view: View) -> dict[str, float]:
        """What is seen at a due step, by metric; `view.batch` is None at the last look, after the last step."""
        del view
        return {}

    def conclude(self, view: View) -> dict[str, float]:
        """What joins the run's final metrics, after the last look; called twice, it says the same twice."""
        del view
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it has summed up: plain values, as `load_state_dict` takes them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        del state


def require_classification(view: View, probe: str) -> None:
    """Raise `UsageError` where the task is not the classification that `probe` counts wrong classes of."""
    task = view.cfg.task.name
    if task != "classification":
        raise UsageError(
            f"probe {probe} counts wrong classes: it needs task=classification, and this is task={task}"
        )


def require_one_process(view: View, probe: str) -> None:
    """Raise `UsageError` where several real ranks train: `probe` has only one process to look at."""
    ranks = view.runtime.world_size
    if ranks > 1:
        raise UsageError(
            f"probe {probe} needs one process, and {ranks} ranks train: use train.virtual=true"
        )
