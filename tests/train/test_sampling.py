"""Sample order: every sample once an epoch, the same for every world size, random access by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncbn.errors import DataError
from syncbn.sampling import SampleStream, by_class, rank_share, share_sizes

seeds = st.integers(0, 2**32)


@st.composite
def sizes(draw):
    """(num_samples, global_batch) with at least one full batch."""
    global_batch = draw(st.integers(1, 40))
    return draw(st.integers(global_batch, 300)), global_batch


@given(sizes(), seeds, st.integers(0, 3))
def test_an_epoch_covers_each_sample_exactly_once(size, seed, epoch):
    stream = SampleStream(*size, seed, drop_last=False)
    steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
    seen = torch.cat([stream.batch(step) for step in steps])
    assert seen.dtype == torch.int64
    assert sorted(seen.tolist()) == list(range(size[0]))


@given(sizes(), seeds)
def test_drop_last_gives_full_batches_of_distinct_samples(size, seed):
    stream = SampleStream(*size, seed, drop_last=True)
    batches = [stream.batch(step) for step in range(stream.steps_per_epoch)]
    assert {len(b) for b in batches} == {size[1]}
    assert len(set(torch.cat(batches).tolist())) == len(batches) * size[1]


@given(sizes(), seeds, st.lists(st.integers(0, 1000), min_size=1, max_size=10))
def test_a_step_has_the_same_samples_whatever_was_asked_before(size, seed, steps):
    one = SampleStream(*size, seed)
    for step in steps:
        assert torch.equal(one.batch(step), SampleStream(*size, seed).batch(step))


@given(st.integers(0, 200), st.integers(1, 17))
def test_ranks_share_a_batch_evenly_and_in_order(n, world_size):
    indices = torch.randperm(n)
    parts = [rank_share(indices, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), indices)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert share_sizes(n, world_size) == lengths


@given(sizes(), seeds, st.integers(1, 9), st.integers(0, 100))
def test_every_world_size_trains_on_the_same_samples(size, seed, world_size, step):
    alone = SampleStream(*size, seed).batch(step)
    ranks = [SampleStream(*size, seed) for _ in range(world_size)]
    together = [rank_share(s.batch(step), r, world_size) for r, s in enumerate(ranks)]
    assert torch.equal(torch.cat(together), alone)


def test_epochs_and_seeds_have_different_orders():
    orders = [SampleStream(100, 100, seed).batch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_a_set_smaller_than_one_global_batch_is_refused():
    with pytest.raises(DataError, match=r"has 63 samples, fewer than one global batch of 64"):
        SampleStream(63, 64, 0, drop_last=False)
    assert len(SampleStream(64, 64, 0).batch(0)) == 64


# Dealt by class


@given(sizes(), seeds, st.integers(1, 6), st.integers(0, 100), st.booleans())
def test_dealt_by_class_a_batch_has_the_same_samples_sorted_by_class(
    size, seed, num_classes, step, drop_last
):
    labels = torch.arange(size[0]) * 7 % num_classes
    shuffled = SampleStream(*size, seed, drop_last).batch(step)
    dealt = SampleStream(*size, seed, drop_last, labels=labels).batch(step)
    assert sorted(dealt.tolist()) == sorted(shuffled.tolist())
    assert dealt.tolist() == sorted(
        shuffled.tolist(), key=lambda i: (labels[i], _place(i, shuffled))
    )


def _place(index: int, order: torch.Tensor) -> int:
    return order.tolist().index(index)


def test_dealt_by_class_a_rank_sees_few_classes():
    labels = torch.arange(1000) % 10
    dealt = SampleStream(1000, 100, seed=0, labels=labels).batch(0)
    shuffled = SampleStream(1000, 100, seed=0).batch(0)

    def classes(batch):
        return [len(labels[rank_share(batch, rank, 10)].unique()) for rank in range(10)]

    assert max(classes(dealt)) <= 3
    assert min(classes(shuffled)) >= 5


def test_by_class_keeps_the_order_within_a_class():
    labels = torch.tensor([1, 0, 1, 0, 2])
    assert by_class(torch.tensor([4, 2, 3, 0, 1]), labels).tolist() == [3, 1, 2, 0, 4]
