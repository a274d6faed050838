"""The page of all results: every claim of every study, a second look over all of them, figures kept small."""

import io

import numpy as np
import pytest
from PIL import Image

from syncbn.compare.suite import results_page
from syncbn.compare.suite.results_page import (
    MOST_BYTES,
    FinishedStudy,
    first_figure,
    generated,
    overturned,
    second_look,
    slim,
    write_page,
)
from syncbn.compare.suite.tiers import Launch
from syncbn.config import ClaimConfig
from syncbn.errors import UsageError


def claim(name, p=0.001, verdict="REPRODUCED", **more):
    declared = ClaimConfig(
        metric="test_error",
        name=name,
        arm="sync",
        against="local",
        threshold=-0.2,
        statement="It is so.",
    )
    found = {"effect": -0.3, "ci": [-0.35, -0.25], "ci90": None, "verdict": verdict, "n": 6, "p": p,
             "p_holm": p, "pairs": [-0.3] * 6, "note": ""}  # fmt: skip
    return {**vars(declared), **found, **more}


def summary(study="demo", *claims):
    design = {"data": "digits", "model": "mlp", "world_size": 2, "per_rank_batch": 2, "steps": 600,
              "seeds": [0, 1], "split": "test", "statement": "BN helps.", "later": "Or not."}  # fmt: skip
    arm = {"test_error": [0.1, 0.2], "world_size": [2, 2]}
    return {"study": study, "git": "abc", "versions": {"torch": "2.15.0"}, "design": design,
            "arms": {"local": arm, "sync": arm}, "claims": list(claims)}  # fmt: skip


def shown(*summaries):
    return [FinishedStudy(s, f"What of {s['study']}?", 60.0, None) for s in summaries]


def test_the_page_shows_every_claim_with_what_its_verdict_rests_on():
    page = generated(shown(summary("demo", claim("beats"))), missing=["late"])
    row = next(line for line in page.splitlines() if line.startswith("| beats"))
    row = row.replace("\N{MINUS SIGN}", "-")
    for part in ("REPRODUCED", "-30.0 points", "-35.0 to -25.0 points", "| 6 |", "below -20.0"):
        assert part in row
    assert "### demo" in page
    assert "What of demo?" in page
    assert "Or not." in page
    assert "It is so." in page
    assert "Not finished: late." in page


def test_the_page_names_every_revision_once():
    mixed, later = summary("one"), summary("two")
    mixed["git"], later["git"] = "aaa, bbb", "bbb"
    assert "revision `aaa`, `bbb`, torch" in generated(shown(mixed, later))


def test_a_second_look_corrects_over_the_primary_claims_of_all_studies():
    first = summary("one", claim("strong", 0.0001), claim("weak", 0.04))
    second = summary("two", claim("other", 0.02), claim("aside", 0.9, primary=False))
    looked = {c.claim: c.p for c in second_look([first, second])}
    assert looked == pytest.approx({"strong": 0.0003, "weak": 0.04, "other": 0.04})
    assert not overturned([first, second])


def test_a_second_look_names_the_verdicts_that_it_would_change_and_changes_none():
    first = summary("one", claim("weak", 0.04), claim("lost", 0.04, "INCONCLUSIVE"))
    second = summary("two", claim("no", None, "NOT REPRODUCED"))
    assert [(c.study, c.claim) for c in overturned([first, second])] == [("one", "weak")]
    page = generated(shown(first, second))
    assert "1 would be inconclusive: `weak` of one (p = 0.120)" in page
    assert next(li for li in page.splitlines() if li.startswith("| weak")).count("REPRODUCED") == 1


def test_the_page_marks_secondary_claims():
    assert "aside (secondary)" in generated(shown(summary("x", claim("aside", primary=False))))


def picture(noise):
    """A PNG: line art on white, or `noise`, which compresses badly."""
    pixels = np.full((400, 600, 3), 255, dtype=np.uint8)
    pixels[200:203] = (0, 114, 178)
    if noise:
        pixels[:200] = np.random.default_rng(0).integers(0, 256, (200, 600, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_small_figure_is_kept_as_it_is_and_a_large_one_loses_colours_not_pixels():
    small, large = picture(noise=False), picture(noise=True)
    assert slim(small) == small
    assert len(large) > MOST_BYTES
    assert len(slim(large)) < len(large) / 2
    assert Image.open(io.BytesIO(slim(large))).size == (600, 400)


def test_the_figure_is_the_first_that_the_report_shows(tmp_path):
    assert first_figure(tmp_path) is None
    (tmp_path / "report.md").write_text(
        "![a](figures/gone.png)\n![b](figures/b.png)\n![c](figures/c.png)"
    )
    (tmp_path / "figures").mkdir()
    for name in "bc":
        (tmp_path / "figures" / f"{name}.png").write_bytes(b"x")
    assert first_figure(tmp_path) == tmp_path / "figures" / "b.png"


def test_without_a_page_or_a_finished_study_nothing_is_written(tmp_path, monkeypatch):
    launch = Launch("demo", "demo", "?", (), 1, 0.0)
    with pytest.raises(UsageError, match="no study is finished"):
        write_page([launch], tmp_path, tmp_path / "results.md")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match=r"results\.md is missing"):
        write_page([launch], tmp_path, tmp_path / "results.md")
    (tmp_path / "results.md").write_text("no markers")
    monkeypatch.setattr(results_page, "read_summary", lambda folder: summary("demo", claim("c")))
    with pytest.raises(UsageError, match="must contain"):
        write_page([launch], tmp_path, tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == "no markers"
