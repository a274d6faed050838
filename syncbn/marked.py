"""Pages of which a part is written by a program, between two markers, and the rest by hand."""


def insert(page: str, begin: str, end: str, generated: str) -> str:
    """`page` with `generated` between its lines `begin` and `end`, in place of what stood there.

    Raises:
        ValueError: a marker is missing.
    """
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page must contain the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{generated}\n\n{end}{after}"
