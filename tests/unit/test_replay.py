"""What is remembered of passes that may be run again: those whose graphs are alive, and no growing list."""

import torch

from syncbn.norm.moments import Block
from syncbn.norm.ops.recompute import Replays


def found(value: float) -> Block:
    block = Block(3, torch.float32)
    block.values.fill_(value)
    return block


def test_passes_that_are_gone_leave_nothing_behind():
    replays = Replays()
    for value in range(2000):
        replays.keep(found(value))
    assert len(replays._passes) <= 17
    assert not replays.alive()


def test_the_list_grows_with_the_passes_that_are_alive_and_shrinks_with_them():
    replays = Replays()
    alive = [found(value) for value in range(100)]
    for block in alive:
        replays.keep(block)
        for _ in range(5):
            replays.keep(found(-1))
    assert replays.alive() == alive
    assert len(replays._passes) <= 2 * 100 + 17
    alive.clear()
    del block
    for _ in range(500):
        replays.keep(found(-1))
    assert len(replays._passes) <= 17


def test_a_pass_that_is_alive_is_recalled_after_others_have_gone():
    replays, first = Replays(), found(7)
    replays.keep(first)
    for value in range(100, 300):
        replays.keep(found(value))
    last = found(8)
    replays.keep(last)
    for block in (first, last):
        statistics = replays.recall(block.own.clone())
        assert statistics is not None
        assert statistics.mean.data_ptr() == block.statistics.mean.data_ptr()
    assert replays.recall(found(9).own) is None
    assert replays.recall(found(150).own) is None
