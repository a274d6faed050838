"""Tasks: sums that give one process's values on any number of ranks, and what is refused."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from syncbn.config import TaskConfig
from syncbn.errors import NonFinite, UsageError
from syncbn.norm import RanksDisagree
from syncbn.registry import TASKS
from syncbn.runtime.base import Solo
from syncbn.runtime.local import TorchrunRuntime
from syncbn.tasks import Classification, Regression, Task, build_task, loss_of, measures_of
from syncbn.train.evaluation import evaluate, own_batches

CPU = torch.device("cpu")


def test_classification_is_summed_cross_entropy_and_the_share_of_errors():
    task = build_task(TaskConfig(label_smoothing=0.1, top=2))
    logits, classes = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = nn.functional.cross_entropy(logits, classes, label_smoothing=0.1)
    torch.testing.assert_close(task.loss(logits, classes), 6 * expected)
    found = task.measures(logits, classes)
    torch.testing.assert_close(
        found["loss"] / 6, nn.functional.cross_entropy(logits.double(), classes)
    )
    wrong = [row.argmax().item() != k for row, k in zip(logits, classes.tolist(), strict=True)]
    missed = [
        k not in row.topk(2).indices.tolist()
        for row, k in zip(logits, classes.tolist(), strict=True)
    ]
    assert (found["error"], found["error_top2"]) == (sum(wrong), sum(missed))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_regression_averages_a_samples_values_and_sums_over_samples(shape):
    task = build_task(TaskConfig(name="regression"))
    output, target = torch.randn(5, *(shape or (1,))), torch.randn(5, *shape)
    difference = output.reshape(target.shape) - target
    torch.testing.assert_close(task.loss(output, target), 5 * difference.square().mean())
    found = task.measures(output, target)
    torch.testing.assert_close(found["error"].float(), 5 * difference.abs().mean())


@pytest.mark.parametrize(
    "task", [Classification(cfg=TaskConfig(top=3)), Regression(cfg=TaskConfig())]
)
def test_an_empty_batch_adds_nothing(task):
    target = (
        torch.empty(0, dtype=torch.int64) if isinstance(task, Classification) else torch.empty(0, 4)
    )
    output = torch.empty(0, 4, requires_grad=True)
    task.loss(output, target).backward()
    assert all(value == 0 for value in task.measures(output, target).values())


def _evaluated(runtime, num_samples=7):
    x = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(num_samples) % 4
    own = own_batches(num_samples, runtime, 2)
    return evaluate(
        nn.Identity(),
        Classification(cfg=TaskConfig(top=2)),
        ((x[i], y[i]) for i in own),
        runtime,
        torch.float32,
        num_classes=4,
    )[0]


@pytest.mark.parametrize("num_samples", range(1, 14))
def test_ranks_share_out_a_test_set_in_equally_many_batches(num_samples):
    """None is empty but where a rank has no sample, or batches of one."""
    ranks = [Mock(rank=rank, world_size=3) for rank in range(3)]
    shares = [list(own_batches(num_samples, rank, 2)) for rank in ranks]
    assert len({len(share) for share in shares}) == 1
    assert all(len(part) <= 2 for share in shares for part in share)
    dealt = torch.cat([part for share in shares for part in share])
    assert dealt.sort().values.tolist() == list(range(num_samples))
    assert num_samples < 3 or all(len(part) for share in shares for part in share)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("num_samples", [7, 1])
def test_measures_of_unequal_shares_are_those_of_one_process(world_size, num_samples):
    ours, alone = _evaluated(TorchrunRuntime(CPU), num_samples), _evaluated(Solo(CPU), num_samples)
    assert ours.keys() == alone.keys() == {"test_loss", "test_error", "test_error_top2"}
    assert ours == pytest.approx(alone, abs=1e-12)


class _Odd(Task):
    decides = "beauty"

    def loss(self, output, target):
        return output.sum()

    def measures(self, output, target):
        return {"loss": output.sum() * float("nan"), "error": output.sum()}


def test_what_decides_must_be_measured_and_a_loss_must_be_finite(monkeypatch):
    batches = [(torch.ones(2, 1), torch.zeros(2))]
    with pytest.raises(UsageError, match="measures gives loss, error: 'beauty' must be among them"):
        evaluate(nn.Identity(), _Odd(), batches, Solo(CPU), torch.float32, 1)
    monkeypatch.setattr(_Odd, "decides", "error")
    with pytest.raises(NonFinite, match="test loss is not finite"):
        evaluate(nn.Identity(), _Odd(), batches, Solo(CPU), torch.float32, 1)


def test_a_task_derives_from_task(monkeypatch):
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries))

    @TASKS.register("plain")
    def plain(): ...

    with pytest.raises(
        UsageError, match=r"task=plain is a NoneType: it must derive from syncbn.extend.Task"
    ):
        build_task(TaskConfig(name="plain"))


class _Wrong(Task):
    def __init__(self, gives):
        self.gives = gives

    def loss(self, output, target):
        return self.gives(output, target)

    def measures(self, output, target):
        return self.gives(output, target)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda output, target: None, "gave a NoneType"),
        (lambda output, target: output.sum(1), r"gave a tensor \(2,\)"),
        (lambda output, target: {"loss": output}, "gave a (dict|tensor .* as 'loss')"),
        (lambda output, target: {"loss": 1.0}, "gave a (dict|float as 'loss')"),
        (
            lambda output, target: output @ target,
            r"on a tensor \(2, 3\) of outputs and a tensor \(2,\)",
        ),
        (lambda output, target: {}["key"], "failed on .*: KeyError: 'key'"),
    ],
)
@pytest.mark.parametrize("read", [loss_of, measures_of])
def test_what_a_task_does_wrong_is_said_in_one_line(read, gives, message):
    with pytest.raises(UsageError, match=message) as raised:
        read(_Wrong(gives), torch.ones(2, 3), torch.ones(2))
    assert "\n" not in str(raised.value)


@pytest.mark.world_size(2)
def test_ranks_that_measure_different_things_are_told_so(world_size):
    runtime = TorchrunRuntime(CPU)

    class Uneven(Classification):
        def measures(self, output, target):
            return super().measures(output, target) | {f"of_{runtime.rank}": output.sum()}

    batches = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(
        RanksDisagree, match="rank 0 has loss error of_0, rank 1 has loss error of_1"
    ):
        evaluate(nn.Identity(), Uneven(cfg=TaskConfig()), batches, runtime, torch.float32, 4)
