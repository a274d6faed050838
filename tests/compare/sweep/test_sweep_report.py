"""The table, the figure and the report of a sweep, from a summary alone."""

from dataclasses import asdict
from itertools import pairwise

import pytest
from PIL import Image

from syncbn.compare.measure import measure
from syncbn.compare.report.figures.canvas import Picture
from syncbn.compare.report.figures.parallel import parallel_coordinates, placed, scale_of, thinned
from syncbn.compare.report.words.sweep import headline, short_keys, tally
from syncbn.compare.sweep.page import html, markdown
from syncbn.compare.sweep.tables import failure_rows, trial_header, trial_rows


def trial(name, settings, error=None, failed=""):
    code = {"diverged": 8, "failed": 3}.get(failed, 0)
    return {
        "name": name,
        "overrides": " ".join(f"{key}={value}" for key, value in settings.items()),
        "settings": settings,
        "texts": {key: str(value) for key, value in settings.items()},
        "status": failed or "finished",
        "exit_code": code,
        "error": f"why it {failed}" if failed else "",
        "final": {} if failed else {"test_error": error, "train_loss": 2 * error},
        "steps": None if failed else 10,
        "seconds": None if failed else 1.5,
    }


@pytest.fixture
def summary():
    trials = [
        trial("a", {"optim.lr": 0.1, "model": "cnn"}, 0.05),
        trial("b", {"optim.lr": 0.01, "model": "[mlp|x]"}, 0.25),
        trial("c", {"optim.lr": 10.0, "model": "cnn"}, failed="diverged"),
        trial("d", {"optim.lr": 10.0, "model": "[mlp|x]"}, failed="failed"),
    ]
    return {
        "sweep": "mine",
        "measure": asdict(measure("test_error")),
        "keys": {"optim.lr": [0.01, 0.1, 10.0], "model": ["cnn", "[mlp|x]"]},
        "best": "a",
        "command": "syncbn sweep optim.lr=0.01,0.1,10",
        "best_command": "syncbn train optim.lr=0.1 model=cnn",
        "versions": {"torch": "2"},
        "git": "abc",
        "config": {"seed": 0},
        "trials": trials,
    }


def test_a_row_a_trial_with_its_settings_and_those_that_failed_say_so(summary):
    header, rows = trial_header(summary), trial_rows(summary)
    assert header[1:4] == ["lr", "model", "test error"]
    assert [row[:4] for row in rows] == [
        ["1", "0.1", "cnn", "5.0 %"],
        ["2", "0.01", "[mlp|x]", "25.0 %"],
        ["\N{EN DASH}", "10.0", "cnn", "diverged"],
        ["\N{EN DASH}", "10.0", "[mlp|x]", "failed"],
    ]
    assert {len(row) for row in rows} == {len(header)}
    assert failure_rows(summary)[1] == ("optim.lr=10.0 model=[mlp|x]", "why it failed")


def test_the_best_is_said_in_words_and_what_is_no_share_has_no_percent(summary):
    assert headline(summary) == "Best of 4 trials: test error 5.0 % with optim.lr=0.1, model=cnn"
    assert tally(summary) == "2 finished, 1 diverged and 1 failed"
    summary["measure"]["unit"] = ""
    assert "test error 0.0500 with" in headline(summary)
    summary["best"] = None
    assert headline(summary) == "None of 4 trials has a test error"


def test_keys_are_short_where_no_other_is_called_the_same():
    assert list(short_keys(["optim.lr", "model.options.width", "model.width"]).values()) == [
        "lr",
        "model.options.width",
        "model.width",
    ]


def test_numbers_that_span_decades_lie_by_their_logarithms_and_others_as_they_are():
    assert placed([0.01, 0.1, 1.0], ratio=10) == pytest.approx([0, 0.5, 1])
    assert placed([0.0, 0.1, 1.0], ratio=10) == pytest.approx([0, 0.1, 1])
    assert placed([1.0, 2.0, 5.0], ratio=10) == pytest.approx([0, 0.25, 1])
    assert placed([3.0], ratio=10) == [0.5]


def test_what_is_no_number_lies_at_equal_distances_in_the_order_given():
    scale = scale_of(["null", "0.9", "null", "0.99"], [None, 0.9, None, 0.99])
    assert scale.places == {"null": 0.0, "0.9": 0.5, "0.99": 1.0}
    assert set(scale.labels.values()) == {"null", "0.9", "0.99"}
    assert scale_of(["true", "false"], [True, False]).places == {"true": 0.0, "false": 1.0}
    (label,) = scale_of(["a" * 40 + "tail"], ["x"]).labels.values()
    assert len(label) <= 18
    assert label.endswith("tail")


def test_labels_that_would_overlap_are_left_out_and_the_ends_stay():
    kept = thinned({i / 100: str(i) for i in range(101)})
    assert {0.0, 1.0} <= set(kept)
    places = sorted(kept)
    assert all(b - a >= 0.0499 for a, b in pairwise(places))


def test_reports_have_the_figure_all_trials_what_failed_and_the_commands(summary):
    picture = Picture("parallel_coordinates", "a title", "a caption", b"PNG")
    text, page = markdown(summary, picture), html(summary, picture)
    assert "figures/parallel_coordinates.png" in text
    for report in (text, page):
        assert "syncbn train optim.lr=0.1 model=cnn" in report
        assert "why it failed" in report
    assert "\\[mlp\\|x\\]" in text
    assert "http" not in page.replace("http-equiv", "")


def test_a_sweep_without_any_result_still_has_a_figure(summary):
    none = summary | {"trials": summary["trials"][2:], "best": None}
    assert parallel_coordinates(none).title == "None of 2 trials has a test error"


def test_the_figure_grows_with_its_axes_and_takes_a_hundred_trials(summary, tmp_path):
    keys = [f"model.options.a_rather_long_name_{i}" for i in range(9)]
    summary["keys"] = {key: [0, 1, 2] for key in keys}
    trials = [
        trial(str(i), {key: (i + j) % 3 for j, key in enumerate(keys)}, i / 100) for i in range(100)
    ]
    picture = parallel_coordinates(summary | {"trials": trials, "best": "0"})
    (tmp_path / "a.png").write_bytes(picture.png)
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 1500
    assert height < 800
