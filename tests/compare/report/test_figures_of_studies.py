"""The figures of the declared studies: which are drawn, what their titles say, what becomes of censored seeds."""

import io
import math
import re

import pytest
from fabricated_studies import fabricate
from matplotlib.image import imread

from syncbn.compare.measure import measure
from syncbn.compare.report.figures import batches, dots, gallery, grids, paired
from syncbn.compare.report.figures.canvas import styled
from syncbn.compare.report.figures.gallery import chosen
from syncbn.config import ClaimConfig

TWO_SEEDS = "study.seeds=[0,1]"
ALWAYS = {"error_by_arm", "paired_differences", "training_loss", "seconds"}
VIRTUAL = {"batch_size", "population", "leak"}
DRAWN = {
    "batch_size": {"normalisation_batch", "convergence"},
    "population": {"normalisation_batch", "primary_by_arm"},
    "ioffe_mnist": {"convergence", "steps_to_target", "quantiles"},
    "saturation": {"convergence", "saturation", "gradient_norms"},
    "shift_by_depth": {"convergence", "shift"},
    "smoothness": {"convergence", "smoothness"},
    "equivalence": {"equivalence"},
    "leak": {"leak"},
    "cost": {"cost"},
    "higher_lr": {"convergence", "steps_to_target"},
}
FIRST = {
    "batch_size": "normalisation_batch",
    "population": "normalisation_batch",
    "higher_lr": "steps_to_target",
    "equivalence": "equivalence",
    "leak": "leak",
    "cost": "cost",
    "shift_by_depth": "shift",
    "smoothness": "smoothness",
    "placement": "error_by_arm",
    "lr_init_grid": "cell_map",
}


def names(summary, trials) -> list[str]:
    return [builder.draw.__name__ for builder in chosen(summary, trials)]


def picture(name: str, summary, trials):
    """One picture, drawn as in a report."""
    builder = next(b for b in chosen(summary, trials) if b.draw.__name__ == name)
    with styled():
        return builder.draw(summary, trials)


@pytest.fixture(scope="module")
def study():
    """Fabricated studies by name, each made once."""
    made = {}

    def find(name: str):
        if name not in made:
            made[name] = fabricate(name, TWO_SEEDS)
        return made[name]

    return find


@pytest.mark.parametrize("name", DRAWN)
def test_a_study_has_the_figures_that_it_has_numbers_for_and_no_others(study, name):
    without = {"seconds"} if name in VIRTUAL else set()
    assert set(names(*study(name))) == (ALWAYS | DRAWN[name]) - without


@pytest.mark.parametrize("name", FIRST)
def test_the_first_figure_is_about_the_primary_metric(study, name):
    assert names(*study(name))[0] == FIRST[name]


def test_every_figure_is_drawn_by_some_declared_study(study):
    every = {builder.draw.__name__ for builder in gallery.BUILDERS}
    assert every == {name for one in (*DRAWN, *FIRST) for name in names(*study(one))}


@pytest.mark.parametrize(
    ("name", "figure", "gone"),
    [
        ("ioffe_mnist", "quantiles", "quantile/"),
        ("saturation", "gradient_norms", "grad_norm/"),
        ("saturation", "saturation", "saturation/"),
        ("shift_by_depth", "shift", "shift/"),
        ("equivalence", "equivalence", "oracle_gap_"),
        ("smoothness", "smoothness", ("loss_range", "gradient_", "effective_")),
    ],
)
def test_a_figure_is_left_out_where_its_numbers_are_missing(study, name, figure, gone):
    summary, trials = study(name)
    assert figure in names(summary, trials)
    bare = [
        type(trial)(
            **{
                **vars(trial),
                "points": {m: p for m, p in trial.points.items() if not m.startswith(gone)},
            }
        )
        for trial in trials
    ]
    assert figure not in names(summary, bare)


def test_a_grid_of_forty_cells_has_a_map_and_no_row_a_cell(study):
    assert names(*study("lr_init_grid")) == ["cell_map", "paired_differences"]


TITLES = {
    ("batch_size", "normalisation_batch"): r"Test error is 3\d\.\d %|Test error is 4\d\.\d %",
    (
        "lr_init_grid",
        "cell_map",
    ): "Combinations that train: 6 of 20 with no norm, 20 of 20 with batch norm",
    (
        "cost",
        "cost",
    ): r"A step takes 1\.\d+ times as long with synchronised batch norm as with local batch norm",
    (
        "leak",
        "leak",
    ): r"Error in training mode, then in evaluation mode: .*local_by_class 1.\d . 45.0 %",
    (
        "shift_by_depth",
        "shift",
    ): r"From layer to layer the shift changes by .1\.1\d .* with none_10, .1\.0\d",
    (
        "saturation",
        "gradient_norms",
    ): r"Over training, layer 1's gradient is 2\d\d times as large with small_bn",
    (
        "saturation",
        "saturation",
    ): r"Saturated outputs, at most: 100.0 % with large_none \(layer 1, step 5000\), 12.0 %",
    (
        "smoothness",
        "smoothness",
    ): r"With batch norm the range of the loss along the gradient is 0\.2\d+ times that",
    (
        "equivalence",
        "equivalence",
    ): r"at most [\d.]+e.14 with sync_2, sync_3, sync_4, one_process; sync_2_float32 .*e.6",
    (
        "ioffe_mnist",
        "quantiles",
    ): r"the quantiles move by 0\.[67]\d spreads with none_lr0.1, by 0\.[12]\d spreads",
}


@pytest.mark.parametrize(("name", "figure"), TITLES)
def test_a_title_says_what_was_found_and_the_figure_fits_the_common_width(study, name, figure):
    found = picture(figure, *study(name))
    assert re.search(TITLES[name, figure], found.title), found.title
    assert imread(io.BytesIO(found.png), format="png").shape[1] == 900
    assert "virtual ranks" in found.caption or "real rank" in found.caption


def test_a_title_says_the_opposite_where_the_numbers_do():
    """The same study in which fewer samples do better says so."""
    errors = {"local": 0.05, "group_2": 0.02, "group_4": 0.06, "sync": 0.07}
    summary, trials = fabricate(
        "batch_size", TWO_SEEDS, errors=lambda arm, seed: errors.get(arm, 0.1)
    )
    assert batches._title(summary, batches.main_curve(summary, trials)) == (
        "Test error is 5.0 % where 2 samples share statistics, 7.0 % where 16 do; smallest at 4: 2.0 %"
    )


def test_published_curves_are_those_whose_columns_are_numbers(study):
    labels = [label for label, _, _ in batches.published_curves(study("batch_size")[0])]
    assert labels == [
        "batch norm, Wu & He 2018",
        "group norm, Wu & He 2018",
        "batch norm, Wu & Johnson 2021",
    ]
    assert batches.published_curves(study("ioffe_mnist")[0]) == []


def test_norms_that_share_over_ranks_are_one_curve(study):
    curves = batches.curves_of(*study("batch_size"))
    assert [size for size, _ in curves["shared"]] == [2, 4, 8, 16]
    assert curves["ghost"] == [(2, "ghost")]


def censor(trial) -> None:
    """Without a norm, seed 1 never gets to the target, and the others late."""
    if trial.arm == "none":
        late = {500: 0.5, 1000: 0.2 if trial.seed == 1 else 0.05}
        trial.points["test_error"] = late
        trial.final["test_error"] = late[1000]


def test_a_censored_seed_is_counted_and_enters_no_mean():
    cfg = (
        "study.target.error=0.1",
        "study.target.arm=null",
        "study.claims=[]",
        "study.seeds=[0,1,2]",
    )
    summary, _ = fabricate("higher_lr", *cfg, edit=censor)
    assert summary["arms"]["none"]["steps_to_target"] == [1000, None, 1000]
    assert re.fullmatch(
        r"Median steps to 10.0 % error: 1000 with no norm \(2 of 3 seeds\), \d+ with bn_x30 \(3 of 3 seeds\)",
        dots.steps_title(summary),
    )
    assert dots._reached_words(summary, "none") == "1000\n2 of 3 reached"


def test_steps_to_a_target_have_no_median_where_half_the_seeds_never_arrive():
    cfg = (
        "study.target.error=0.1",
        "study.target.arm=null",
        "study.claims=[]",
        "study.seeds=[0,1]",
    )
    summary, _ = fabricate("higher_lr", *cfg, edit=censor)
    assert dots._reached_words(summary, "none") == "1 of 2 reached"
    assert dots.steps_title(summary) == (
        "Seeds that get to 10.0 % error: 1 of 2 with no norm, 2 of 2 with bn_x30"
    )


def test_a_cell_trains_for_the_seeds_at_or_below_the_target(study):
    summary, _ = study("lr_init_grid")
    assert grids.trained(summary, "none_0.05_0.1") == (2, 2)
    assert grids.trained(summary, "none_5_0.1") == (0, 2)


@pytest.mark.parametrize(
    ("error", "counts", "words"),
    [
        (0.0331, (6, 6), "3.3"),
        (0.104, (1, 6), "10\n1/6"),
        (0.45, (0, 6), "45"),
        (1.0, (0, 6), "div."),
        (0.2, None, "20"),
    ],
)
def test_a_cell_tells_its_error_and_how_many_seeds_trained(error, counts, words):
    assert grids.cell_words(error, counts, measure("test_error")) == words


@pytest.mark.parametrize(
    ("parts", "stretches"),
    [
        ({"kind": "less", "threshold": -0.2}, [(-math.inf, -0.2)]),
        ({"kind": "greater", "threshold": 0.1}, [(0.1, math.inf)]),
        ({"kind": "equivalent", "threshold": 0.02}, [(-0.02, 0.02)]),
        ({"kind": "equivalent", "threshold": 1.25, "scale": "ratio"}, [(0.8, 1.25)]),
        ({"kind": "within", "range": [0.1, 0.25]}, [(0.1, 0.25)]),
        ({"kind": "different", "threshold": 0.01}, [(-math.inf, 0.0), (0.0, math.inf)]),
        ({"kind": "different", "scale": "ratio"}, [(-math.inf, 1.0), (1.0, math.inf)]),
        ({"kind": "increasing", "along": ["a", "b"]}, [(0.0, math.inf)]),
        ({"kind": "decreasing", "along": ["a", "b"], "threshold": 0.5}, [(-math.inf, -0.5)]),
    ],
)
def test_what_a_claim_demands_is_shaded(parts, stretches):
    claim = vars(ClaimConfig(name="c", metric="test_error", arm="a", against="b")) | parts
    assert paired.demanded(claim) == stretches


def test_a_claim_with_a_censored_seed_is_not_drawn_and_is_named():
    summary, _ = fabricate(
        "higher_lr",
        "study.target.error=0.1",
        "study.target.arm=null",
        "study.seeds=[0,1]",
        edit=censor,
    )
    drawn = [claim["name"] for claim in paired.judged(summary)]
    assert "faster_at_its_best_rate" not in drawn
    assert "faster_at_its_best_rate" in paired._undrawn(summary, paired.judged(summary))


def test_secondary_claims_stand_last_and_say_so(study):
    claims = paired.judged(study("batch_size")[0])
    assert [claim["primary"] for claim in claims] == [True, True, False, False]
    assert "(secondary): group_norm_is_apart" in paired._heading(claims[2])
