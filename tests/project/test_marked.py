"""The written part of a page is replaced, and nothing else."""

import pytest

from syncbn.marked import insert


def test_only_what_stands_between_the_markers_is_replaced():
    page = "above\n<b>\nold\n<e>\nbelow\n"
    once = insert(page, "<b>", "<e>", "new")
    assert once == "above\n<b>\n\nnew\n\n<e>\nbelow\n"
    assert insert(once, "<b>", "<e>", "new") == once


@pytest.mark.parametrize("page", ["nothing", "only <b>", "only <e>", "<e> before <b>"])
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(ValueError, match="must contain the lines '<b>' and '<e>'"):
        insert(page, "<b>", "<e>", "new")
