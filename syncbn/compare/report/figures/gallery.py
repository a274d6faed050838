"""All figures of a study: a table of builders, each drawn exactly when its numbers are there.

No study says which figures it wants. What it measured decides, and figures of its primary metric come first.
"""

from collections.abc import Callable
from dataclasses import dataclass

from syncbn.compare.measure import DEFAULT, decided_by, primary_of
from syncbn.compare.report.figures import (
    batches,
    costs,
    curves,
    dots,
    gaps,
    grids,
    layers,
    paired,
)
from syncbn.compare.report.figures.canvas import Picture, styled
from syncbn.compare.report.figures.series import Trials
from syncbn.compare.study.summary import Summary, base_of, is_grid


@dataclass(frozen=True)
class Builder:
    """A figure: when it can be drawn, how, and which primary metrics it is the first figure for.

    `test_error` stands for the measure that the task decides by.
    """

    applies: Callable[[Summary, Trials], bool]
    draw: Callable[[Summary, Trials], Picture]
    about: tuple[str, ...] = ()
    in_grids: bool = False
    """Whether it stays legible where every arm was run in dozens of cells."""


BUILDERS = (
    Builder(batches.has_batches, batches.normalisation_batch, ("test_error", "precise_gap")),
    Builder(grids.has_grid, grids.cell_map, ("cells_trained", "test_error"), in_grids=True),
    Builder(dots.has_steps, dots.steps_to_target, ("steps_to_target",)),
    Builder(gaps.has_gaps, gaps.equivalence, ("oracle_gap_weights", "oracle_gap_gradient")),
    Builder(layers.has_shift, layers.shift, ("shift_slope", "shift")),
    Builder(gaps.has_smoothness, gaps.smoothness, ("loss_range", "effective_beta")),
    Builder(dots.has_modes, dots.leak, ("leak_gap",)),
    Builder(costs.has_costs, costs.cost, ("step_ms", "exchange_ms", "exchange_share")),
    Builder(dots.has_primary, dots.primary_by_arm),
    Builder(paired.has_claims, paired.paired_differences, in_grids=True),
    Builder(dots.has_errors, dots.error_by_arm, ("test_error",)),
    Builder(curves.can_converge, curves.convergence),
    Builder(layers.has_quantiles, layers.quantiles, ("quantile_range",)),
    Builder(layers.has_saturation, layers.saturation, ("saturation",)),
    Builder(layers.has_gradients, layers.gradient_norms, ("grad_norm",)),
    Builder(curves.has_losses, curves.training_loss),
    Builder(dots.has_seconds, dots.seconds),
)
"""In the order of a report, once those about the study's primary metric stand first."""


def chosen(summary: Summary, trials: Trials) -> list[Builder]:
    """The builders whose numbers are there, in the order in which a report shows their figures."""
    metric = base_of(primary_of(summary))
    metric = DEFAULT if metric == decided_by(summary).name else metric
    grid = is_grid(summary)
    return [
        builder
        for builder in sorted(BUILDERS, key=lambda builder: metric not in builder.about)
        if (builder.in_grids or not grid) and builder.applies(summary, trials)
    ]


def draw(summary: Summary, trials: Trials) -> list[Picture]:
    """All figures of a study that its numbers allow, in the order in which a report shows them."""
    with styled():
        return [builder.draw(summary, trials) for builder in chosen(summary, trials)]
