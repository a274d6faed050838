"""The measures of an extension's task, found by letting it measure two samples before any trial starts.

The names that a task gives are known only from what it returns. A claim on one that nobody gives would otherwise be
refused when all trials are done.
"""

import torch

from syncbn.compare.study.design import study_of
from syncbn.compare.study.measurements import at_end
from syncbn.compare.study.preflight import claimable_metrics, refuse_unmeasured
from syncbn.config import Config
from syncbn.data import load_data
from syncbn.models import build_model
from syncbn.tasks import build_task, collate_of, measures_of, metrics_of, outputs_of


def refuse_ungiven(cfg: Config) -> None:
    """Refuse a study with a claim on a measure that its task, an extension's, does not give.

    Data and model are built only where a claim speaks of a measure that is not known without them.

    Raises:
        UsageError: names what the task gives.
        DataError: see `load_data`.
    """
    study, known = study_of(cfg), claimable_metrics(cfg)
    spoken = {at_end(claim.metric) for claim in study.claims}
    unknown = any(name.startswith("test_") and name not in known for name in spoken)
    if not unknown:
        return
    given = (*known, *(name for name in measured_names(cfg) if name not in known))
    for claim in study.claims:
        refuse_unmeasured(claim, given)


def measured_names(cfg: Config) -> list[str]:
    """`test_<name>` of all that the task of `cfg` gives for two samples."""
    task = build_task(cfg.task)
    sets = load_data(cfg.data, cfg.seed, collate=collate_of(task))
    model = build_model(cfg.model, sets.shape, sets.num_classes, cfg.seed).eval()
    inputs, target = next(iter(sets.test.batches([torch.arange(min(2, len(sets.test)))])))
    with torch.no_grad():
        found = measures_of(task, outputs_of(task, model, inputs, target), target)
    return [f"test_{name}" for name in {**found, **metrics_of(task, sets.num_classes)}]
