"""Figures: titles that follow the numbers, looks that tell arms apart, sizes that fit a page."""

import colorsys
import importlib
import io
import sys

import numpy as np
import pytest
from fabricated_studies import fabricate
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from trial_files import DEMO_CLAIMS, demo_error, make_study, study_config

from syncbn.compare import report
from syncbn.compare.report.figures import gallery
from syncbn.compare.report.figures.canvas import Picture, arm_styles, columns_of
from syncbn.compare.report.figures.gallery import draw
from syncbn.compare.report.figures.series import geometric_mean, shared_points, smooth
from syncbn.compare.study.records import read_trials
from syncbn.compare.study.summarise import summarise
from syncbn.config import ARMS, ClaimConfig


def drawn(tmp_path, error_of=demo_error, **settings) -> dict[str, Picture]:
    """The pictures of a study whose trials did what `error_of` says, by name."""
    settings = {"arms": ("local", "sync"), "seeds": (0, 1, 2), "steps": 300} | settings
    cfg = study_config(tmp_path, **settings)
    make_study(cfg, error_of, loss_noise=0.0)
    trials = read_trials(cfg)
    return {p.name: p for p in draw(summarise(cfg, cfg.study, trials), trials)}


def falling(arm: str, seed: int, step: int) -> float:
    """local stays at 40 %, sync falls from 50 % by 10 points a hundred steps."""
    return 0.4 if arm == "local" else 0.6 - 0.001 * step


CLAIM = (ClaimConfig(name="beats", arm="sync", against="local", threshold=-0.05),)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("runs"), falling, claims=CLAIM)


def test_titles_state_what_the_numbers_show(pictures):
    titles = {name: picture.title for name, picture in pictures.items()}
    assert titles == {
        "error_by_arm": "Test error at 2 samples a rank: local batch norm 40.0 %, "
        "synchronised batch norm 30.0 %",
        "paired_differences": "1 of 1 claim reproduced",
        "convergence": "Synchronised batch norm is at local batch norm's final 40.0 % error "
        "by step 200 of 300",
        "training_loss": "Training loss ends at 1.2 with local batch norm, "
        "at 0.93 with synchronised batch norm",
        "seconds": "Synchronised batch norm takes 1.29 times as long as local batch norm "
        "(95 % interval 1.25 to 1.32)",
    }


def test_a_title_admits_when_the_other_arm_is_never_reached(tmp_path):
    worse = drawn(tmp_path, lambda arm, seed, step: 0.1 if arm == "local" else 0.5, claims=CLAIM)
    assert worse["convergence"].title == (
        "Synchronised batch norm does not get to local batch norm's final 10.0 % error in 300 steps"
    )
    assert worse["paired_differences"].title == "0 of 1 claim reproduced, 1 not reproduced"


def test_no_ratio_of_times_is_told_where_a_trial_diverged(tmp_path):
    cfg = study_config(tmp_path, ("local", "sync"), (0, 1), steps=100)
    make_study(cfg, falling)
    trials = read_trials(cfg)
    trials[0].final["diverged"] = 1.0
    pictures = {p.name: p for p in draw(summarise(cfg, cfg.study, trials), trials)}
    assert pictures["seconds"].title == (
        "Synchronised batch norm or local batch norm has trials that diverged before they could be timed"
    )


def test_every_caption_says_real_ranks_and_how_many(pictures):
    assert all("2 real ranks" in picture.caption for picture in pictures.values())


def test_a_caption_names_arms_on_another_number_of_ranks(tmp_path):
    pictures = drawn(tmp_path, arms=("sync", "big_batch"))
    assert "(big_batch: 1 rank)" in pictures["error_by_arm"].caption


@pytest.mark.parametrize("name", ["error_by_arm", "paired_differences", "convergence"])
def test_pictures_are_900_pixels_wide_and_nothing_runs_over_their_right_edge(pictures, name):
    image = imread(io.BytesIO(pictures[name].png), format="png")
    assert image.shape[1] == 900
    assert (image[:, -2:, :3] > 0.9).all() or name == "paired_differences"


def test_a_study_without_claims_has_no_figure_of_them(tmp_path):
    assert "paired_differences" not in drawn(tmp_path)


def test_a_single_evaluation_is_no_curve_and_a_single_seed_can_be_drawn(tmp_path):
    pictures = drawn(tmp_path, steps=50, seeds=(0,), claims=DEMO_CLAIMS[:1])
    assert list(pictures) == ["error_by_arm", "paired_differences", "training_loss", "seconds"]
    assert pictures["paired_differences"].title == "0 of 1 claim reproduced, 1 inconclusive"


def test_figures_are_drawn_without_pyplot(monkeypatch):
    package = "syncbn.compare.report.figures"
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(report, "figures", report.figures)  # the package that other tests have
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # not to be imported
    anew = importlib.import_module(f"{package}.gallery")
    assert anew is not gallery
    assert anew.draw(*fabricate("equivalence", "study.seeds=[0,1]"))


def test_every_known_arm_has_a_marker_and_a_line_of_its_own():
    given_looks = list(arm_styles(ARMS).values())
    for part in ("colour", "marker", "line"):
        assert len({getattr(look, part) for look in given_looks}) == len(ARMS)


def test_arms_of_the_demo_differ_in_grey_too():
    demo = ("none", "local", "sync", "big_batch")
    grey = [colorsys.rgb_to_yiq(*to_rgb(look.colour))[0] for look in arm_styles(demo).values()]
    assert np.diff(sorted(grey)).min() > 0.02


def test_an_arm_has_the_same_style_beside_any_other_arms():
    assert arm_styles(["sync", "local"])["sync"] == arm_styles(["mine", "none", "sync"])["sync"]


def test_arms_of_a_studys_own_get_styles_that_no_other_arm_has():
    names = ["sync", "local", "lr_0.1", "lr_1", "lr_3"]
    assert len({look.marker for look in arm_styles(names).values()}) == len(names)


def test_no_two_of_twenty_five_arms_look_alike():
    names = ["sync", *(f"arm_{i}" for i in range(24))]
    assert len(set(arm_styles(names).values())) == len(names)
    eighteen = arm_styles(names[:18]).values()
    assert len({(look.colour, look.line) for look in eighteen}) == 18
    assert len({look.marker for look in eighteen}) == 18


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(1, 9))
def test_smoothing_keeps_length_and_stays_within_the_values(values, window):
    window = min(window, len(values))
    smoothed = smooth(np.array([values]), window)[0]
    assert smoothed.shape == (len(values),)
    assert min(values) - 1e-9 <= smoothed.min()
    assert smoothed.max() <= max(values) + 1e-9


def test_smoothing_over_a_window_of_one_changes_nothing():
    assert smooth(np.array([[1.0, 5.0, 2.0]]), 1).tolist() == [[1.0, 5.0, 2.0]]


def test_smoothing_no_values_gives_no_values():
    assert smooth(np.empty((3, 0)), 2).shape == (3, 0)


def test_a_geometric_mean_leaves_out_what_has_no_logarithm():
    found = geometric_mean(np.array([[1.0, 100.0, 0.0, np.nan], [0.0, 0.0, -1.0, np.nan]]))
    assert found[0] == pytest.approx(10.0)
    assert np.isnan(found[1])


def test_curves_end_where_the_first_seed_stopped(tmp_path):
    cfg = study_config(tmp_path, ("sync",), (0, 1), steps=300)
    make_study(cfg, falling)
    whole, cut = read_trials(cfg)
    del cut.points["test_error"][300]
    steps, values = shared_points([whole, cut], "test_error")
    assert (steps.tolist(), values.shape) == ([100.0, 200.0], (2, 2))


@pytest.mark.parametrize(("longest", "columns"), [(13, 4), (20, 3), (40, 1), (200, 1)])
def test_a_legend_has_the_columns_that_fit(longest, columns):
    assert columns_of(["x" * longest, "x"]) == columns
