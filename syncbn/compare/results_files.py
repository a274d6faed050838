"""The page of results on disk: summaries read, the first figure of each study copied beside it, the page rewritten.

The decision that shaped the file: figures are line art on white, so where a picture weighs too much for a repository it
is stored with a palette of few colours instead of with fewer pixels.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from syncbn.compare import ledger
from syncbn.compare.results_page import BEGIN, END, Shown, generated, overturned
from syncbn.compare.summaries import read_summary
from syncbn.compare.tiers import Launch
from syncbn.errors import UsageError
from syncbn.marked import insert

MOST_BYTES = 100_000
_COLOURS = (128, 64, 32)


def write_page(launches: Sequence[Launch], runs_dir: Path, page: Path) -> dict[str, Any]:
    """Rewrite what stands between the markers of `page` from the studies that are finished in `runs_dir`.

    Returns:
        What the page shows: its studies, those that are missing, and claims that a second look would overturn.

    Raises:
        UsageError: no study is finished, or `page` is missing or has no markers.
    """
    finished = [
        launch for launch in launches if (runs_dir / launch.name / "summary.json").is_file()
    ]
    if not finished:
        names = ", ".join(launch.name for launch in launches)
        raise UsageError(f"no study is finished in {runs_dir}: looked for {names}")
    if not page.is_file():
        raise UsageError(f"page {page} is missing: give --page, or start in the project's folder")
    missing = [launch.name for launch in launches if launch not in finished]
    entries = ledger.read(runs_dir)
    shown = [_shown(launch, runs_dir, page.parent, entries) for launch in finished]
    try:
        text = insert(page.read_text(), BEGIN, END, generated(shown, missing))
    except ValueError as error:
        raise UsageError(f"{page}: {error}") from error
    page.write_text(text)
    return {
        "page": str(page),
        "studies": [launch.name for launch in finished],
        "missing": missing,
        "overturned": [asdict(claim) for claim in overturned([s.summary for s in shown])],
    }


def _shown(
    launch: Launch, runs_dir: Path, docs: Path, entries: Mapping[str, ledger.Entry]
) -> Shown:
    folder = runs_dir / launch.name
    figure = copy_first(folder, launch.name, docs / "figures")
    return Shown(
        summary=read_summary(folder),
        question=launch.question,
        seconds=entries.get(launch.name, {}).get("seconds", 0.0),
        figure=None if figure is None else f"figures/{figure.name}",
    )


def copy_first(study: Path, name: str, folder: Path) -> Path | None:
    """Copy the first figure of the report in `study` to `folder` as result_<name>.png; None where there is none."""
    source = first_figure(study)
    if source is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"result_{name}.png"
    target.write_bytes(slim(source.read_bytes()))
    return target


def first_figure(study: Path) -> Path | None:
    """The figure that the report in `study` shows first."""
    report = study / "report.md"
    named = (
        re.findall(r"\(figures/([\w.-]+\.png)\)", report.read_text()) if report.is_file() else []
    )
    files = [study / "figures" / figure for figure in named]
    return next((file for file in files if file.is_file()), None)


def slim(png: bytes) -> bytes:
    """`png`, with fewer colours where it has more than `MOST_BYTES`."""
    from PIL import Image

    smallest = png
    for colours in _COLOURS:
        if len(smallest) <= MOST_BYTES:
            break
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        picture.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        smallest = min(smallest, buffer.getvalue(), key=len)
    return smallest
