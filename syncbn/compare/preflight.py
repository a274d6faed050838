"""What a study is refused for before anything starts, rather than when its trials are done.

The decision that shaped the file: it looks at configs alone, so that the answer comes before torch or Ray is imported.
What trials really did is looked at again when they are compared (`records`).
"""

from collections.abc import Mapping
from dataclasses import asdict

from syncbn.compare.records import difference
from syncbn.compose import vary
from syncbn.config import Config, RunConfig, StudyConfig
from syncbn.errors import UsageError

MEASURED = ("train_loss", "test_loss", "test_error", "diverged", "seconds", "steps", "world_size")
"""What every trial leaves as one number, for claims to speak of."""


def refuse_unfit(cfg: Config, study: StudyConfig) -> None:
    """Refuse a study whose trials could not be compared as it says.

    Raises:
        UsageError: an arm that cannot be composed, trains on another number of ranks, or differs from the first
            outside `study.factor`; a claim on what no trial measures.
    """
    arms = {arm: vary(cfg, overrides) for arm, overrides in study.arms.items()}
    for arm, run in arms.items():
        _refuse_other_ranks(arm, run, cfg.launcher.num_workers)
    _refuse_other_factors(arms, study.factor)
    _refuse_unmeasured(study, measured(cfg))


def measured(cfg: Config) -> tuple[str, ...]:
    """The metrics of every arm in the study's summary."""
    return MEASURED if cfg.train.target_error is None else (*MEASURED, "steps_to_target")


def _refuse_other_ranks(arm: str, run: RunConfig, num_workers: int) -> None:
    if run.launcher.num_workers != num_workers:
        raise UsageError(
            f"study arm {arm!r} has launcher.num_workers={run.launcher.num_workers}, the study {num_workers}: all "
            "arms share its ranks (norm=big_batch takes one process for the whole batch)"
        )


def _refuse_other_factors(arms: Mapping[str, RunConfig], factor: list[str]) -> None:
    first, *others = arms
    for arm in others:
        found = difference(asdict(arms[first]), asdict(arms[arm]), factor)
        if found is not None:
            raise UsageError(
                f"study arms {first!r} and {arm!r} differ in {found}, which study.factor={factor} does not allow"
            )


def _refuse_unmeasured(study: StudyConfig, metrics: tuple[str, ...]) -> None:
    for claim in study.claims:
        if claim.metric not in metrics:
            raise UsageError(
                f"claim {claim.name!r}: metric={claim.metric!r} is not measured: one of {', '.join(metrics)}"
            )
