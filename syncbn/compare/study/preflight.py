"""What a study is refused for before anything starts.

Only configs are read, so the answer comes before torch or Ray is imported. What trials really did is checked when they
are compared (`records`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from syncbn.compare.measure import deciding, given
from syncbn.compare.study.design import about_the_task, arm_configs, arms_in
from syncbn.compare.study.measurements import (
    CELLS_TRAINED,
    STEPS_TO_TARGET,
    at_end,
    best_name,
    target_of,
)
from syncbn.compare.study.records import difference
from syncbn.compare.study.tuning import followed
from syncbn.config import ClaimConfig, Config, RunConfig, StudyConfig
from syncbn.errors import UsageError
from syncbn.registry import TASKS

MEASURED = ("diverged", "seconds", "steps", "world_size")
"""What every trial leaves as one number beside its measures, for claims to speak of."""

OF_PROBE = {
    "quantiles": ("quantile_range", "quantile_range_unit0"),
    "shift": ("shift_slope", "shift/"),
    "saturation": ("saturation/",),
    "gradients": ("grad_norm/",),
    "population": (
        "test_error_running",
        "test_error_precise",
        "test_error_batch",
        "precise_gap",
        "running_mean_gap",
        "running_var_gap",
        "batch_dependence",
    ),
    "smoothness": ("loss_range", "gradient_predictiveness", "effective_beta"),
    "leak": ("train_mode_error", "eval_mode_error", "leak_gap"),
    "exchange": ("step_ms", "exchange_bytes", "exchange_ms", "exchange_share"),
    "oracle": (
        "oracle_gap_loss",
        "oracle_gap_gradient",
        "oracle_gap_buffers",
        "oracle_gap_weights",
    ),
}
"""What each probe leaves; a name that ends in a slash stands for one a layer."""


def refuse_unfit(cfg: Config, study: StudyConfig) -> None:
    """Refuse a study whose trials could not be compared as it says.

    Raises:
        UsageError: an arm that cannot be composed, or differs from the first outside `study.factor`; an arm that sets
            what is searched for; a claim on what no trial measures, or on arms that differ in more than it may.
    """
    arms, study = arm_configs(cfg), about_the_task(study, cfg)
    _refuse_other_factors(arms, [*study.factor, *free_keys(study)], f"study.factor={study.factor}")
    _refuse_bad_search(study)
    for claim in study.claims:
        if not _may_be_given(cfg, at_end(claim.metric)):
            refuse_unmeasured(claim, claimable_metrics(cfg))
        _refuse_unlike_arms(claim, arms, study)


def claimable_metrics(cfg: Config) -> tuple[str, ...]:
    """The metrics that claims of the study in `cfg` may speak of."""
    study = cfg.study
    names = ["train_loss", *given(cfg.task), *MEASURED, best_name(deciding(cfg.task))]
    names += (name for probe in cfg.probe.names for name in OF_PROBE.get(probe, ()))
    if study is not None and target_of(cfg) is not None:
        names += [CELLS_TRAINED if study.grid else STEPS_TO_TARGET]
    if study is not None and study.tune is not None:
        names += [f"tuned_{study.tune.key.rpartition('.')[2]}"]
    return tuple(names)


def free_keys(study: StudyConfig) -> list[str]:
    """Keys in which arms differ by the study's own doing: those of its grid, and what it searches for."""
    return [*study.grid, *([study.tune.key] if study.tune is not None else [])]


def _refuse_other_factors(arms: Mapping[str, RunConfig], free: Sequence[str], rule: str) -> None:
    first, *others = arms
    for arm in others:
        found = difference(asdict(arms[first]), asdict(arms[arm]), free)
        if found is not None:
            raise UsageError(
                f"study arms {first!r} and {arm!r} differ in {found}, which {rule} does not allow"
            )


def _refuse_bad_search(study: StudyConfig) -> None:
    """A search is the same for all arms: none sets its own value; those that follow name one that is searched."""
    if study.tune is None:
        return
    for arm, overrides in study.arms.items():
        if any(override.split("=")[0] == study.tune.key for override in overrides):
            raise UsageError(
                f"study arm {arm!r} sets {study.tune.key}, which study.tune searches for in every arm alike: "
                "leave it to the search, or name a rule in study.tune.follow"
            )
    if set(study.tune.seeds) & set(study.seeds):
        raise UsageError(
            f"study.tune.seeds={study.tune.seeds} overlap study.seeds={study.seeds}: the search has seeds of its own"
        )
    for arm, rule in study.tune.follow.items():
        leader, _ = followed(rule)
        searched = [name for name in study.arms if name not in study.tune.follow]
        if arm not in study.arms or leader not in searched:
            raise UsageError(
                f"study.tune.follow: {arm}: {rule!r} is not allowed: an arm, after one of {', '.join(searched)}"
            )


def _may_be_given(cfg: Config, name: str) -> bool:
    """Whether the task of an extension may have a measure of that name; `rehearsal` finds out."""
    return cfg.task.name not in TASKS.built_in and name.startswith("test_")


def refuse_unmeasured(claim: ClaimConfig, metrics: tuple[str, ...]) -> None:
    """Refuse a claim on a metric that is none of `metrics`; one that ends in a slash stands for one a layer.

    Raises:
        UsageError: names what there is.
    """
    name = at_end(claim.metric)
    if not any(name == known or (known[-1] == "/" and name.startswith(known)) for known in metrics):
        raise UsageError(
            f"claim {claim.name!r}: metric={claim.metric!r} is not measured: one of {', '.join(metrics)}"
        )


def _refuse_unlike_arms(
    claim: ClaimConfig, arms: Mapping[str, RunConfig], study: StudyConfig
) -> None:
    """The arms of a claim that names its own factor may differ in nothing else."""
    if claim.factor is None or study.grid:
        return
    own = {arm: arms[arm] for arm in arms_in(claim)}
    searched = [] if study.tune is None else [study.tune.key]
    _refuse_other_factors(
        own, [*claim.factor, *searched], f"factor={claim.factor} of claim {claim.name!r}"
    )
