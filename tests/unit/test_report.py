"""The report: what it says, that it escapes it, and that it stands alone."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from trial_files import DEMO_CLAIMS, demo_error, make_study, study_config

from syncbn.compare.canvas import Picture
from syncbn.compare.records import read_trials
from syncbn.compare.report import Page, html, markdown, print_table
from syncbn.compare.results import summarise
from syncbn.compare.tables import arm_header, arm_rows, claim_rows
from syncbn.compare.wording import MINUS, NOTHING, TIMES, number, tally, verdict_sentence
from syncbn.config import ClaimConfig

PNG = b"\x89PNG not really"
PICTURE = Picture("error_by_arm", "local <36 %> error", "2 real ranks & more", PNG)
PLAIN = str.maketrans({MINUS: "-", TIMES: "x", NOTHING: "-"})
"""Typographic signs as a keyboard has them."""
HOSTILE = "<script>alert('x')</script> | *bold* `code` [link](x)"


def study(tmp_path, claims=DEMO_CLAIMS, **settings):
    cfg = study_config(tmp_path, claims=claims, **settings)
    make_study(cfg, demo_error)
    return summarise(cfg, cfg.study, read_trials(cfg))


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return study(tmp_path_factory.mktemp("runs"))


def page(summary, **parts) -> Page:
    settings = {
        "summary": summary,
        "question": "Does synchronising mend it?",
        "command": "python jobs/compare.py study=demo launcher.num_workers=2",
        "config": {"train": {"steps": 600}},
        "pictures": [PICTURE],
    }
    return Page(**(settings | parts))


@pytest.mark.parametrize("render", [markdown, html])
def test_a_report_answers_question_claims_and_how_to_repeat_it(summary, render):
    text = render(page(summary)).replace("\\", "").translate(PLAIN)
    for part in (
        "Does synchronising mend it?",
        "2 of 2 claims reproduced",
        "REPRODUCED",
        "Synchronised statistics beat each rank",
        "The whole interval lies below -20.0 points, as claimed.",
        "python jobs/compare.py study=demo launcher.num_workers=2",
        "2.15.0",
        "0123abc",
        "35.9 %",
        "2 real ranks",
        "steps",
    ):
        assert part in text


class Outline(HTMLParser):
    """Collects tags, what they refer to, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_data(self, data) -> None:
        self.text += data


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    return parser


def test_html_asks_for_nothing_outside_itself(summary):
    text = html(page(summary))
    found = outline(text)
    assert found.references == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://", text)


def test_html_fits_a_phone(summary):
    text = html(page(summary))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count('<div class="scroll"><table>') == outline(text).tags.count("table") == 3


def test_text_of_a_study_cannot_become_markup(tmp_path):
    claim = ClaimConfig(name="c", arm="sync", against="local", threshold=-0.2, statement=HOSTILE)
    hostile = study(tmp_path, (claim,), seeds=(0, 1, 2))
    parts = {"question": HOSTILE, "command": HOSTILE, "config": {"x": HOSTILE}}
    found = outline(html(page(hostile, **parts)))
    assert "script" not in found.tags
    assert found.text.count(HOSTILE) == 4 + 1  # title, heading, command, config; statement
    plain = markdown(page(hostile, **parts)).split("## Repeat it")[0]
    assert "<script>" not in plain
    assert "\\| \\*bold\\* \\`code\\` \\[link\\]" in plain


def test_every_picture_is_told_to_those_who_cannot_see_it(summary):
    assert 'alt="local &lt;36 %&gt; error. 2 real ranks &amp; more"' in html(page(summary))


def test_markdown_tables_have_as_many_cells_in_every_row(summary):
    tables = re.findall(r"(?:^\|.*\n)+", markdown(page(summary)), re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_study_of_its_own_points_to_its_config(summary):
    assert "the config below is the whole study" in markdown(page(summary, command=None))


def test_arms_are_told_with_median_interval_range_and_time(summary):
    rows = {row[0]: row for row in arm_rows(summary)}
    assert rows["local"] == ("local", "35.9 %", "33.3 to 37.6 %", "31.6 to 37.4 %", "1.05 s")
    assert len(arm_header(summary)) == 5


def test_a_target_adds_how_many_reached_it_and_the_median_step(tmp_path):
    found = study(tmp_path, target_error=0.1)
    assert arm_header(found)[-2:] == ("reached target", "median steps to it")
    rows = {row[0]: row[-2:] for row in arm_rows(found)}
    assert rows["sync"] == ("6 of 6", "400")
    assert rows["local"] == ("0 of 6", NOTHING)


def test_claims_are_told_in_points(summary):
    assert tuple(cell.translate(PLAIN) for cell in claim_rows(summary)[0]) == (
        "sync_beats_local",
        "REPRODUCED",
        "-29.9 points",
        "-31.4 to -27.7",
        "below -20.0",
        "< 0.001",
    )


def entry(**parts) -> dict:
    """A claim as the summary holds it."""
    settings = {
        "name": "c",
        "metric": "test_error",
        "scale": "difference",
        "kind": "less",
        "arm": "sync",
        "against": "local",
        "threshold": -0.2,
        "effect": -0.3,
        "ci": [-0.4, -0.25],
        "n": 6,
        "p_holm": 0.001,
        "verdict": "REPRODUCED",
        "note": "",
    }
    return settings | parts


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"verdict": "NOT REPRODUCED", "ci": [-0.1, 0.0], "effect": -0.0001},
            "Test error, sync - local: 0.0 points, 95 % interval -10.0 to 0.0 points over 6 seeds. "
            "Claimed was below -20.0 points; the whole interval lies elsewhere.",
        ),
        (
            {"verdict": "INCONCLUSIVE", "kind": "greater", "threshold": 0.01, "effect": 0.02},
            "Test error, sync - local: +2.0 points, 95 % interval -40.0 to -25.0 points over 6 "
            "seeds. Claimed was above +1.0 points; these seeds cannot tell.",
        ),
        (
            {"kind": "equivalent", "threshold": 0.02, "effect": 0.001, "ci": [-0.01, 0.012]},
            "Test error, sync - local: +0.1 points, 95 % interval -1.0 to +1.2 points over 6 "
            "seeds. Both one-sided tests put it within ±2.0 points, as claimed (p = 0.001).",
        ),
        (
            {
                "verdict": "INCONCLUSIVE",
                "effect": None,
                "ci": [None, None],
                "note": "1 of 6 pairs are censored or not finite",
                "metric": "steps_to_target",
                "scale": "ratio",
                "threshold": 0.5,
            },
            "Steps to target, sync / local: no effect can be given. Claimed was below x0.500; "
            "undecided, because 1 of 6 pairs are censored or not finite.",
        ),
        (
            {"metric": "seconds", "scale": "ratio", "kind": "equivalent", "threshold": 1.25}
            | {"effect": 1.1, "ci": [0.9, 1.2]},
            "Seconds, sync / local: x1.10, 95 % interval x0.900 to x1.20 over 6 seeds. Both "
            "one-sided tests put it within x0.800 to x1.25, as claimed (p = 0.001).",
        ),
    ],
)
def test_a_verdict_reads_as_a_sentence(parts, sentence):
    assert verdict_sentence(entry(**parts)).translate(PLAIN) == sentence


def test_a_tally_counts_every_verdict_and_admits_that_nothing_was_claimed():
    words = ["REPRODUCED", "NOT REPRODUCED", "INCONCLUSIVE", "INCONCLUSIVE"]
    claims = [entry(verdict=word) for word in words]
    assert tally(claims) == "1 of 4 claims reproduced, 1 not reproduced, 2 inconclusive"
    assert tally([]) == "No claim was declared"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0.00"), (1.0, "1.00"), (400, "400"), (12345, "12345")]
)
def test_numbers_have_three_significant_digits_and_no_needless_exponent(value, text):
    assert number(value).translate(PLAIN) == text


def test_the_terminal_gets_arms_claims_and_where_the_report_is(summary, tmp_path):
    console = Console(file=io.StringIO(), width=140)
    print_table(summary, console, tmp_path)
    text = console.file.getvalue().translate(PLAIN)
    for part in ("local", "35.9 %", "31.6 to 37.4 %", "1.05 s", "REPRODUCED", "-29.9 points"):
        assert part in text
    assert f"Report: {tmp_path / 'report.html'}" in text.replace("\n", "")


def test_verdicts_are_coloured_and_names_are_no_markup(tmp_path):
    claim = ClaimConfig(name="[red]c[/red]", arm="sync", against="local", threshold=-0.2)
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    print_table(study(tmp_path, (claim,), seeds=(0, 1, 2)), console)
    text = console.file.getvalue()
    assert "[red]c[/red]" in text
    assert "\x1b[1;32mREPRODUCED" in text
