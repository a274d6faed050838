"""The report: what it says, that it escapes it, and that it stands alone."""

import base64
import io
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from fabricated_studies import fabricate
from rich.console import Console
from trial_files import DEMO_CLAIMS, demo_error, make_study, study_config

from syncbn.compare.report.figures.canvas import Picture
from syncbn.compare.report.html import html
from syncbn.compare.report.markdown import markdown
from syncbn.compare.report.page import Page
from syncbn.compare.report.tables import arm_header, arm_rows, cell_tables, claim_rows
from syncbn.compare.report.terminal import print_table
from syncbn.compare.report.words.numbers import MINUS, NOTHING, TIMES
from syncbn.compare.study.records import read_trials
from syncbn.compare.study.summarise import summarise
from syncbn.config import ClaimConfig

PNG = b"\x89PNG not really"
PICTURE = Picture("error_by_arm", "local <36 %> error", "2 real ranks & more", PNG)
PLAIN = str.maketrans({MINUS: "-", TIMES: "x", NOTHING: "-", "\N{NO-BREAK SPACE}": " "})
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
        "command": "syncbn compare study=demo launcher.num_workers=2",
        "config": {"train": {"steps": 600}},
        "pictures": [PICTURE],
    }
    return Page(**(settings | parts))


@pytest.mark.parametrize("render", [markdown, html])
def test_a_report_answers_question_claims_and_how_to_repeat_it(summary, render):
    text = unescape(render(page(summary))).replace("\\", "").translate(PLAIN)
    for part in (
        "Does synchronising mend it?",
        "2 of 2 claims reproduced",
        "REPRODUCED",
        "Synchronised statistics beat each rank",
        "The whole interval lies below -20.0 points, as claimed.",
        "syncbn compare study=demo launcher.num_workers=2",
        "Test error with synchronised batch norm is 29.9 points lower than with local batch norm",
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


def test_html_refers_to_nothing_outside_itself(summary):
    text = html(page(summary))
    found = outline(text)
    assert found.references == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://", text)


def test_html_fits_a_phone(summary):
    text = html(page(summary))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count('<div class="scroll"><table>') == outline(text).tags.count("table") == 2
    assert outline(text).tags.count("article") == len(DEMO_CLAIMS)


def test_the_finding_stands_before_the_evidence(summary):
    plain = outline(html(page(summary))).text
    places = [
        plain.index(part)
        for part in (
            "Does synchronising mend it?",
            "REPRODUCED",
            "Test error with synch",
            "Verdicts",
        )
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("render", [markdown, html])
def test_a_contradicted_claim_is_shown_as_prominently_as_a_reproduced_one(tmp_path, render):
    claim = ClaimConfig(name="c", arm="local", against="sync", threshold=-0.2)
    good = ClaimConfig(name="c", arm="sync", against="local", threshold=-0.2)
    bad, fine = (study(tmp_path / str(i), (c,)) for i, c in enumerate((claim, good)))
    loud, quiet = render(page(bad)), render(page(fine))
    assert loud.count("NOT REPRODUCED") == quiet.count("REPRODUCED") - quiet.count(".REPRODUCED {")


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


def test_every_figure_has_its_title_and_caption_as_alternative_text(summary):
    text = html(page(summary))
    assert 'alt="local &lt;36 %&gt; error. 2 real ranks &amp; more"' in text
    assert "<figcaption>2 real ranks &amp; more</figcaption>" in text


def test_markdown_tables_have_as_many_cells_in_every_row(summary):
    tables = re.findall(r"(?:^\|.*\n)+", markdown(page(summary)), re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_study_that_no_file_holds_refers_to_its_config(summary):
    assert "the config below is the whole study" in markdown(page(summary, command=None))


def test_an_arms_row_has_median_interval_range_and_time(summary):
    rows = {row[0]: row for row in arm_rows(summary)}
    assert rows["local"] == ("local", "35.9 %", "33.3 to 37.6 %", "31.6 to 37.4 %", "2", "1.05 s")
    assert rows["none"][4] == "none"
    assert arm_header(summary)[4] == "samples sharing statistics"


def test_a_target_adds_how_many_reached_it_and_the_median_step():
    found, _ = fabricate(
        "higher_lr", "study.seeds=[0,1]", errors=lambda arm, _: 0.3 if arm == "none_x5" else 0.1
    )
    assert arm_header(found)[-3:-1] == ("reached 10.0 %", "median steps to it")
    rows = {row[0]: row[-3:-1] for row in arm_rows(found)}
    assert rows["none"][0] == "2 of 2"
    assert rows["none_x5"] == ("0 of 2", NOTHING)


def test_a_grid_has_a_row_an_arm_and_a_table_of_its_cells():
    found, _ = fabricate("lr_init_grid", "study.seeds=[0]", "study.grid={optim.lr:[0.1,3.0]}")
    assert [row[0] for row in arm_rows(found)] == ["none", "bn"]
    tables = cell_tables(found)
    assert [table.title for table in tables] == ["none", "bn"]
    assert [len(table.rows[0]) for table in tables] == [3, 3]
    assert tables[0].rows[0][2].endswith("(0/1)")


def test_the_primary_metric_has_a_column_of_its_own():
    found, _ = fabricate("cost", "study.seeds=[0,1]")
    assert arm_header(found)[1] == "median time of a step"
    assert arm_rows(found)[0][1].endswith(" ms")


@pytest.mark.parametrize("render", [markdown, html])
def test_literature_later_work_and_tuning_stand_in_the_report(render):
    found, _ = fabricate("batch_size", "study.seeds=[0,1]")
    text = unescape(render(page(found))).replace("\\", "")
    for part in (
        "The text says:",
        "Ranks with small batches break batch norm",
        "Wu & He 2018 (arXiv 1803.08494), Table 2",
        "34.7",
        "Where later work differs",
        "normaliser-free networks",
        "How optim.lr was chosen",
        "0.03: 13.5 %",
        "8 virtual ranks",
    ):
        assert part.lower() in text.lower(), part


def test_the_report_of_a_fast_tier_says_that_it_is_one(summary):
    design = summary["design"] | {"tier": "fast"}
    for render in (markdown, html):
        assert "fast tier: fewer seeds" in render(page(summary | {"design": design}))


def test_a_claims_row_has_its_effect_in_points(summary):
    assert tuple(cell.translate(PLAIN) for cell in claim_rows(summary)[0]) == (
        "sync_beats_local",
        "REPRODUCED",
        "-29.9 points",
        "-31.4 to -27.7",
        "below -20.0",
        "< 0.001",
    )


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
