"""Tasks: what a run optimises, and what it is measured by.

A loss is the *sum* over samples, never their mean. Ranks may hold unequal shares of a global batch, and some none; the
loop divides by the whole batch, so that the gradient is that of the mean over all ranks' samples. Measures are sums for
the same reason: they are added over batches and ranks in float64 and divided by the number of samples once, which gives
the value of a single process whatever the number of ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncbn.config import TaskConfig
from syncbn.errors import UsageError
from syncbn.registry import TASKS


class Task(ABC):
    """What a run optimises and is measured by.

    `output` is what the model returns for a batch of inputs, and `target` the batch of what the data set holds beside
    them: tensors, or whatever structure model and data set agree on.
    """

    decides: ClassVar[str] = "error"
    """The measure by which evaluations are compared, for early stopping and the best checkpoint."""
    lower_is_better: ClassVar[bool] = True

    @abstractmethod
    def loss(self, output: Any, target: Any) -> Tensor:
        """The loss to minimise, summed over the samples of the batch, `()`; 0 for an empty batch."""

    @abstractmethod
    def measures(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Sums over the samples of the batch, `()` each, by name; their means are recorded as `test_<name>`.

        `loss` and the measure that `decides` are among them. In a run that has diverged they may be NaN.
        """

    def num_samples(self, target: Any) -> int:
        """Samples in a batch, by which measures are divided."""
        return len(target)


@TASKS.register("classification")
class Classification(Task):
    """Cross-entropy of logits `(N, num_classes)` with classes, int64 `(N,)`.

    Measures: `loss` (without label smoothing), `error` (the share of samples whose largest logit is not the class),
    and with `top` above 1 `error_top<k>` (the class is not among the `top` largest).

    Args:
        cfg: `label_smoothing` (Szegedy et al. 2016, section 7) and `top`.
    """

    def __init__(self, *, cfg: TaskConfig) -> None:
        self.label_smoothing, self.top = cfg.label_smoothing, cfg.top

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See `Task.loss`."""
        return nn.functional.cross_entropy(
            output, target, reduction="sum", label_smoothing=self.label_smoothing
        )

    def measures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See `Task.measures`."""
        loss = nn.functional.cross_entropy(output.double(), target, reduction="sum")
        found = {"loss": loss, "error": (output.argmax(1) != target).sum().double()}
        if self.top > 1:
            best = output.topk(min(self.top, output.shape[1]), dim=1).indices
            missed = (best != target.unsqueeze(1)).all(1)
            found[f"error_top{self.top}"] = missed.sum().double()
        return found


@TASKS.register("regression")
class Regression(Task):
    """Squared error of outputs against float targets, `(N, *)` both, averaged over a sample's values.

    Measures: `loss` (the mean squared error), `error` (the mean absolute error, in the targets' unit).
    """

    def __init__(self, *, cfg: TaskConfig) -> None:
        del cfg

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See `Task.loss`."""
        return _over_samples(_difference(output, target).square())

    def measures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See `Task.measures`."""
        difference = _difference(output.double(), target.double())
        return {
            "loss": _over_samples(difference.square()),
            "error": _over_samples(difference.abs()),
        }


def build_task(cfg: TaskConfig) -> Task:
    """The task that `cfg` names.

    Raises:
        UsageError: what an extension registered is no `Task`, or an option is not one of its.
    """
    entry = TASKS[cfg.name]
    task = entry.build(**entry.keywords(cfg))
    if not isinstance(task, Task):
        raise UsageError(
            f"task={cfg.name} is a {type(task).__name__}: it must derive from syncbn.extend.Task"
        )
    return task


def loss_of(task: Task, output: Any, target: Any) -> Tensor:
    """The summed loss `()`; what a task or a model of an extension does wrong is told as such.

    Raises:
        UsageError: the task fails on what the model returned, or gives no single number.
    """
    with _told(task, "loss", output, target):
        loss = task.loss(output, target)
    if not isinstance(loss, Tensor) or loss.dim():
        raise UsageError(
            f"{_of(task, 'loss')} gave {_shape(loss)}: the sum over samples, (), is needed"
        )
    return loss


def measures_of(task: Task, output: Any, target: Any) -> dict[str, Tensor]:
    """The task's sums by name, `()` in float64; raises as `loss_of` does."""
    with _told(task, "measures", output, target):
        found = task.measures(output, target)
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{_of(task, 'measures')} gave {_shape(found)}: sums by name are needed")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.dim():
            raise UsageError(
                f"{_of(task, 'measures')} gave {_shape(value)} as {name!r}: the sum over samples, (), is needed"
            )
    return {name: value.detach().double() for name, value in found.items()}


@contextmanager
def _told(task: Task, what: str, output: Any, target: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code") or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UsageError(
            f"{_of(task, what)} failed on {_shape(output)} of outputs and {_shape(target)} of targets: {reason}"
        ) from error


def _of(task: Task, what: str) -> str:
    return f"{what} of the task {type(task).__name__}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _difference(output: Tensor, target: Tensor) -> Tensor:
    """`output` - `target`, of which one may lack a last dimension of 1."""
    return (
        output.reshape(target.shape) - target
        if output.numel() == target.numel()
        else output - target
    )


def _over_samples(values: Tensor) -> Tensor:
    """The sum over samples of the mean over a sample's values, of `values` `(N, *)`."""
    per_sample = max(1, values[:1].numel() if len(values) else 1)
    return values.sum() / per_sample
