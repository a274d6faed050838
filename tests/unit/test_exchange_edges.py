"""Corners of the layer that ranks in good health never see."""

import pytest
import torch

from syncbn.norm import backends as kernels
from syncbn.norm.functional import sync_batch_norm


def test_an_average_over_all_batches_needs_their_number():
    with pytest.raises(ValueError, match="momentum=None needs num_batches_tracked"):
        sync_batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), momentum=None)


def test_tensors_elsewhere_are_left_to_torch():
    assert not kernels.faster_alone(torch.empty(2**10, 2**10, device="meta"))
