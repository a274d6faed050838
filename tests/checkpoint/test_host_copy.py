"""Copies of a state in memory, and the thread that writes them."""

import threading

import pytest
import torch
from checkpoint_kit import bits
from torch import nn

from syncbn.checkpoint import Background, HostCopy
from syncbn.sharded import whole


def test_a_copy_stays_as_it_was_when_the_state_changes_in_place():
    weight = torch.randn(3, 2)
    state = {
        "weight": weight,
        "tied": weight,
        "nested": [(torch.tensor(2.0), "text")],
        "row": weight[1],
    }
    expected = whole(state, torch.clone)
    copied = whole(state, HostCopy().copy)
    with torch.no_grad():
        weight.add_(1)
        state["nested"][0][0].add_(1)
        state["nested"].append("more")
    assert torch.equal(copied["weight"], expected["weight"])
    assert torch.equal(copied["tied"], expected["weight"])
    assert torch.equal(copied["row"], expected["row"])
    assert copied["nested"] == expected["nested"] == [(torch.tensor(2.0), "text")]


def test_the_next_copy_lies_in_the_same_memory():
    memory, places = HostCopy(), []
    for value in (1.0, 2.0):
        memory.rewind()
        copied = whole({"a": torch.full((4,), value), "b": torch.ones(2)}, memory.copy)
        assert copied["a"].tolist() == [value] * 4
        places.append([one.data_ptr() for one in copied.values()])
    assert places[0] == places[1]


def test_a_state_that_has_grown_or_changed_its_shapes_is_copied_all_the_same():
    memory = HostCopy()
    for state in ([torch.ones(2)], [torch.zeros(3, dtype=torch.int64), torch.ones(1)], []):
        memory.rewind()
        copied = whole(state, memory.copy)
        assert [(one.dtype, one.tolist()) for one in copied] == [
            (one.dtype, one.tolist()) for one in state
        ]


def test_a_copy_has_the_kind_and_the_memory_format_of_the_tensor():
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    copied = HostCopy().copy(images)
    assert copied.is_contiguous(memory_format=torch.channels_last)
    special = torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16)
    assert torch.equal(bits(HostCopy().copy(special)), bits(special))
    frozen = HostCopy().copy(nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(frozen) is nn.Parameter
    assert not frozen.requires_grad


def test_work_goes_on_beside_and_its_result_is_given_once():
    work, go = Background(), threading.Event()
    assert work.wait() is None
    work.start(lambda: go.wait(20))
    assert work.running
    go.set()
    assert work.wait() is True
    assert not work.running
    assert work.wait() is None


def test_what_work_failed_of_is_raised_where_it_is_waited_for():
    work = Background()
    work.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work.wait()
    assert work.wait() is None


def test_one_piece_of_work_at_a_time():
    work = Background()
    work.start(lambda: 1)
    with pytest.raises(RuntimeError, match="not waited for"):
        work.start(lambda: 2)
    assert work.wait() == 1
