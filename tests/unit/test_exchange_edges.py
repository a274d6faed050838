"""Corners of the layer that ranks in good health never see."""

import pytest
import torch

from syncbn.norm import backends as kernels
from syncbn.norm.functional import sync_batch_norm
from syncbn.norm.moments import Statistics
from syncbn.norm.ops.recompute import Remembered, Replays, _chosen_on_device


def test_a_replay_is_chosen_among_passes_without_looking_on_the_host():
    passes = [
        Remembered(torch.full((4,), float(n)), Statistics(*(torch.tensor([float(n)]),) * 4))
        for n in range(3)
    ]
    assert float(_chosen_on_device(torch.full((4,), 2.0), passes).mean) == 2.0
    assert Replays().recall(torch.zeros(4)) is None


def test_an_average_over_all_batches_needs_their_number():
    with pytest.raises(ValueError, match="momentum=None needs num_batches_tracked"):
        sync_batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), momentum=None)


def test_tensors_elsewhere_are_left_to_torch():
    assert not kernels.faster_alone(torch.empty(2**10, 2**10, device="meta"))
