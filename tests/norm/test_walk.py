"""A training pass walks through few files, and seldom from one to another."""

import pytest

from benchmarks.walk import walk


@pytest.mark.world_size(2)
def test_a_pass_on_ranks_of_one_machine_enters_few_files(world_size):
    found = walk()
    assert len(found.files) <= 8, found.files
    assert 10 < found.num_changes <= 30, found.stops
