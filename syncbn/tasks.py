"""Tasks: what a run optimises, and what it is measured by.

A loss is the *sum* over samples, never their mean. Ranks may hold unequal shares of a global batch, and some none; the
loop divides by the whole batch, so that the gradient is that of the mean over all ranks' samples. Measures are sums for
the same reason: they are added over batches and ranks in float64 and divided by the number of samples once, which gives
the value of a single process whatever the number of ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import isabstract
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from syncbn.config import TaskConfig
from syncbn.errors import UsageError
from syncbn.registry import TASKS
from syncbn.structure import count, stacked, tensors_of

if TYPE_CHECKING:
    from torchmetrics import Metric

Sample = tuple[Tensor, Any]
"""Input and target of one sample."""
Collate = Callable[[list[Sample]], tuple[Any, Any]]
"""Makes a batch of samples."""


class Task(ABC):
    """What a run optimises and is measured by.

    `output` is what the model returns for a batch of inputs, and `target` the batch of what the data set holds beside
    them: tensors, or dicts, lists and tuples of them (`syncbn.structure`). What is a mean over samples,
    or over what `weight` counts, is one of the `measures`; what is not, such as an area
    under a curve, one of the `metrics`.
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

    def weight(self, target: Any) -> float | Tensor:
        """What a batch counts for: the sums over all ranks of loss and measures are divided by the sum of weights.

        Its number of samples. One that counts something else, such as pixels that are not ignored, costs an exchange
        of one number a step.
        """
        return count(target)

    def outputs(self, model: nn.Module, inputs: Any, target: Any) -> Any:
        """What `model` returns; `model.training` says whether it trains. Call `model` once, also for an empty batch."""
        del target
        return model(inputs)

    def collate(self, samples: list[Sample]) -> tuple[Any, Any]:
        """A batch of inputs and targets; those of this class are stacked, which needs one shape.

        Tensors of a batch have the samples as their first dimension, and a list holds an item a sample.
        """
        return stacked([x for x, _ in samples]), stacked([target for _, target in samples])

    def metrics(self, num_classes: int) -> "dict[str, Metric]":
        """New metrics of torchmetrics by name, recorded as `test_<name>`, for a model built with `num_classes`.

        Values that are no single number are written to the run's `measures/<name>.json`.
        """
        del num_classes
        return {}

    def update(self, metrics: "dict[str, Metric]", output: Any, target: Any) -> None:
        """Let `metrics` see a batch of at least one sample, whose floating values are float64."""
        for metric in metrics.values():
            metric.update(output, target)


@TASKS.register("classification")
class Classification(Task):
    """Cross-entropy of logits `(N, num_classes)` with classes, int64 `(N,)`.

    Measures: `loss` (without label smoothing), `error` (the share of samples whose largest logit is not the class),
    and with `top` above 1 `error_top<k>` (the class is not among the `top` largest).

    Args:
        cfg: `label_smoothing` (Szegedy et al. 2016, section 7), `top`, and `confusion`, which adds `macro_accuracy`,
            the mean over classes of the share of a class that is found, and the table `confusion_matrix`.
    """

    def __init__(self, *, cfg: TaskConfig) -> None:
        self.label_smoothing, self.top = cfg.label_smoothing, cfg.top
        self.confusion = cfg.confusion

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See `Task.loss`."""
        if target.is_floating_point():
            raise UsageError(
                f"task=classification needs classes as targets, whole numbers, and the data set's are {target.dtype}: "
                "task=regression, or give classes"
            )
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

    def metrics(self, num_classes: int) -> "dict[str, Metric]":
        """See `Task.metrics`; rows of the confusion matrix are the true classes."""
        if not self.confusion:
            return {}
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        return {
            "macro_accuracy": MulticlassAccuracy(num_classes, average="macro"),
            "confusion_matrix": MulticlassConfusionMatrix(num_classes),
        }


@TASKS.register("regression")
class Regression(Task):
    """Squared error of outputs against float targets, `(N, *)` both, averaged over a sample's values.

    Measures: `loss` (the mean squared error), `error` (the mean absolute error, in the targets' unit), `r2` (the
    coefficient of determination, averaged over a sample's values; NaN of fewer than two samples).
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

    def metrics(self, num_classes: int) -> "dict[str, Metric]":
        """See `Task.metrics`."""
        del num_classes
        from torchmetrics import R2Score

        class R2(R2Score):
            def compute(self) -> Tensor:
                enough = int(self.total) > 1
                return super().compute() if enough else torch.tensor(torch.nan)

        return {"r2": R2()}

    def update(self, metrics: "dict[str, Metric]", output: Tensor, target: Tensor) -> None:
        """See `Task.update`."""
        predicted = output.reshape(target.shape) if output.numel() == target.numel() else output
        metrics["r2"].update(predicted.flatten(1), target.flatten(1)) if target.dim() > 1 else (
            metrics["r2"].update(predicted, target)
        )


def build_task(cfg: TaskConfig) -> Task:
    """The task that `cfg` names.

    Raises:
        UsageError: what an extension registered is no `Task` or not a whole one, or an option is not one of its.
    """
    entry = TASKS[cfg.name]
    if isabstract(entry.build):
        lacking = ", ".join(sorted(entry.build.__abstractmethods__))
        raise UsageError(f"task={cfg.name} lacks {lacking}: see syncbn.extend.Task")
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
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise UsageError(
            f"{_of(task, 'loss')} depends on no parameter that is trained: it must be a differentiable function of "
            "what the model returns"
        )
    return loss


def outputs_of(task: Task, model: nn.Module, inputs: Any, target: Any) -> Any:
    """What the model returns; raises as `loss_of` does where a task's own `outputs` fails."""
    if type(task).outputs is Task.outputs:
        return model(inputs)
    with _told(task, "outputs", inputs, target, "inputs"):
        return task.outputs(model, inputs, target)


def weight_of(task: Task, target: Any) -> Tensor:
    """What a batch counts for, `()` in float64; raises as `loss_of` does."""
    with _told(task, "weight", None, target):
        weight = torch.as_tensor(task.weight(target), dtype=torch.float64)
    if weight.dim() or not weight >= 0:
        raise UsageError(f"{_of(task, 'weight')} gave {weight.tolist()}: a number from 0 is needed")
    return weight


def metrics_of(task: Task, num_classes: int) -> "dict[str, Metric]":
    """The task's metrics by name; raises as `loss_of` does."""
    if type(task).metrics is Task.metrics:
        return {}
    with _told(task, "metrics", None, None):
        found = task.metrics(num_classes)
    if found == {}:
        return found
    from torchmetrics import Metric

    wrong = found.values() if isinstance(found, dict) else [found]
    for value in wrong:
        if not isinstance(found, dict) or not isinstance(value, Metric):
            raise UsageError(
                f"{_of(task, 'metrics')} gave {_shape(value)}: metrics of torchmetrics by name are needed"
            )
    for name in found:
        if not str(name).isidentifier():
            raise UsageError(
                f"{_of(task, 'metrics')} names one {name!r}: letters, digits and '_' are allowed"
            )
    return found


def update_of(task: Task, metrics: "dict[str, Metric]", output: Any, target: Any) -> None:
    """Let `metrics` see a batch; raises as `loss_of` does."""
    with _told(task, "update", output, target):
        task.update(metrics, output, target)


def computed(task: Task, name: str, metric: "Metric") -> Any:
    """The value of a metric that has seen all batches; raises as `loss_of` does."""
    with _told(task, f"metric {name!r}", None, None):
        return metric.compute()


def collate_of(task: Task) -> "Collate | None":
    """The task's own collation, told as `loss_of` tells; None where tensors are stacked."""
    return None if type(task).collate is Task.collate else partial(_collated, task)


def _collated(task: Task, samples: list[Sample]) -> tuple[Any, Any]:
    with _told(task, "collate", samples, [target for _, target in samples], "samples"):
        batch = task.collate(samples)
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise UsageError(
            f"{_of(task, 'collate')} gave {_shape(batch)}: (inputs, targets) is needed"
        )
    for what, part in zip(("inputs", "targets"), batch, strict=True):
        if not any(True for _ in tensors_of(part)) or count(part) != len(samples):
            raise UsageError(
                f"{_of(task, 'collate')} gave {_shape(part)} as {what} of {len(samples)} sample(s): tensors whose "
                "first dimension is the samples, in dicts or tuples, or a list of an item a sample, are needed"
            )
    return batch


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
def _told(
    task: Task, what: str, output: Any, target: Any, given: str = "outputs"
) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code") or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        seen = [
            f"{_shape(v)} of {n}"
            for v, n in ((output, given), (target, "targets"))
            if v is not None
        ]
        on = f" on {' and '.join(seen)}" if seen else ""
        raise UsageError(f"{_of(task, what)} failed{on}: {reason}") from error


def _of(task: Task, what: str) -> str:
    return f"{what} of the task {type(task).__name__}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _difference(output: Tensor, target: Tensor) -> Tensor:
    """`output` - `target`, of which one may lack a last dimension of 1.

    Raises:
        UsageError: targets are classes.
    """
    if output.numel() != target.numel() and target.dim() == 1 and not target.is_floating_point():
        raise UsageError(
            f"task=regression needs float targets, and the data set's are classes, {target.dtype}, of outputs "
            f"{tuple(output.shape)}: task=classification, or give numbers"
        )
    return (
        output.reshape(target.shape) - target
        if output.numel() == target.numel()
        else output - target
    )


def _over_samples(values: Tensor) -> Tensor:
    """The sum over samples of the mean over a sample's values, of `values` `(N, *)`."""
    per_sample = max(1, values[:1].numel() if len(values) else 1)
    return values.sum() / per_sample
