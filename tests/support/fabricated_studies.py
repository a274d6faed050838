"""Fabricates finished studies in memory: the trials that a declared study leaves, with every probe's numbers.

`fabricate("saturation")` takes the arms and probes from the study's YAML and gives each trial plausible numbers that
depend on its config and seed alone. A test that is about particular numbers gives them with `errors` or `edit`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from syncbn.compare.study.design import Trial, study_of
from syncbn.compare.study.design import trials as declared_trials
from syncbn.compare.study.measurements import normalisation_batch
from syncbn.compare.study.records import TrialRecord
from syncbn.compare.study.summarise import summarise
from syncbn.compare.study.tuning import Choice
from syncbn.compose import compose
from syncbn.config import Config, RunConfig

ErrorOf = Callable[[str, int], float]
"""Test error at the end of (arm, seed)."""
Points = dict[str, dict[int, float]]


def fabricate(
    study: str | Config,
    *overrides: str,
    errors: ErrorOf | None = None,
    edit: Callable[[TrialRecord], None] | None = None,
) -> tuple[dict[str, Any], list[TrialRecord]]:
    """Summary and trials of a declared study (or of a config that holds one) that nobody ran.

    Args:
        study: name of a file in conf/study, or the composed config.
        overrides: as on the command line.
        errors: what each trial ended with, instead of what its norm suggests.
        edit: changes a trial's numbers before they are summed up.
    """
    cfg = compose([f"study={study}", *overrides]) if isinstance(study, str) else study
    choices = _choices(cfg)
    values = {arm: choice.value for arm, choice in choices.items()} or None
    records = [_record(trial, errors) for trial in declared_trials(cfg, values)]
    for record in records:
        if edit is not None:
            edit(record)
    return summarise(cfg, study_of(cfg), records, choices), records


def _choices(cfg: Config) -> dict[str, Choice]:
    study = study_of(cfg)
    if study.tune is None:
        return {}
    tried = {value: [0.1 + 0.05 * i, 0.12] for i, value in enumerate(study.tune.values)}
    return {
        arm: Choice(study.tune.values[i % 2 + 1], tried if arm not in study.tune.follow else {})
        for i, arm in enumerate(study.arms)
    }


def _record(trial: Trial, errors: ErrorOf | None) -> TrialRecord:
    run = trial.config
    rng = np.random.default_rng([trial.seed, *trial.arm.encode()])
    end = errors(trial.arm, trial.seed) if errors else _end(run, rng)
    points = {**_learning(run, end, rng), **_looks(run, rng)}
    final = {
        "test_error": end,
        "test_loss": 3 * end,
        "train_loss": points["train_loss"][run.train.steps],
    }
    return TrialRecord(
        arm=trial.arm,
        seed=trial.seed,
        config=asdict(run),
        versions={"python": "3.11.2", "torch": "2.15.0", "syncbn": "0.1.0"},
        git="0123abc",
        final={**final, **_finals(run, end, points, rng)},
        steps=run.train.steps,
        seconds=(1.3 if run.norm.name == "sync" else 1.0) + 0.05 * rng.uniform(),
        world_size=run.num_ranks,
        samples="0123abc",
        points=points,
    )


def _end(run: RunConfig, rng: np.random.Generator) -> float:
    """More with fewer samples that share statistics; more without a norm, most with wild weights or rates."""
    samples = normalisation_batch(run)
    base = 0.08 if samples is None else 0.055 + 1.1 / samples**1.6
    wild = run.norm.name == "none" and (run.model.init_std >= 0.5 or run.optim.lr >= 1)
    base = 0.9 if wild else base
    return float(np.clip(base * np.exp(0.08 * rng.normal()), 0, 0.9))


def _marks(run: RunConfig, every: int) -> list[int]:
    steps = run.train.steps
    return sorted({*range(every, steps + 1, every or steps), steps}) if every else [steps]


def _learning(run: RunConfig, end: float, rng: np.random.Generator) -> Points:
    """Test error and training loss on the way down to `end`."""
    steps, pace = run.train.steps, run.train.steps / (12 if run.norm.name != "none" else 5)
    fall = {s: end + (0.9 - end) * math.exp(-s / pace) for s in _marks(run, run.train.eval_every)}
    errors = {s: float(e * np.exp(0.03 * rng.normal())) for s, e in fall.items()}
    errors[steps] = end
    losses = {
        s: float((2.3 * math.exp(-s / pace) + 2 * end) * np.exp(0.2 * rng.normal()))
        for s in _marks(run, run.train.log_every)
    }
    return {
        "test_error": errors,
        "test_loss": {s: 3 * e for s, e in errors.items()},
        "train_loss": losses,
    }


def _num_layers(run: RunConfig) -> int:
    return len(run.model.hidden) + 1 if run.model.name == "mlp" else 4


def _looks(run: RunConfig, rng: np.random.Generator) -> Points:
    """The points of every probe that is asked for."""
    steps = [0, *_marks(run, run.probe.every)]
    points: Points = {}
    for name in run.probe.names:
        for metric, values in _LOOKS.get(name, lambda *_: iter(()))(run, np.array(steps), rng):
            points[metric] = dict(zip(steps, map(float, values), strict=True))
    return points


def _quantiles(run: RunConfig, steps: Any, rng: Any) -> Iterator[tuple[str, Any]]:
    drift = 1.5 if run.norm.name == "none" else 0.15
    walk = drift * np.cumsum(rng.normal(size=len(steps))) / np.sqrt(len(steps))
    for quantile, place in ((15, -1.0), (50, 0.0), (85, 1.1)):
        yield f"quantile/{quantile}", walk + place * (1 + 0.2 * steps / steps.max())


def _shift(run: RunConfig, steps: Any, rng: Any) -> Iterator[tuple[str, Any]]:
    growth = 0.12 if run.norm.name == "none" else 0.02
    for layer in range(1, _num_layers(run)):
        yield f"shift/{layer}", 0.05 * np.exp(growth * layer + 0.1 * rng.normal(size=len(steps)))


def _saturation(run: RunConfig, steps: Any, rng: Any) -> Iterator[tuple[str, Any]]:
    start = 0.9 if run.norm.name == "none" and run.model.init_std > 1 else 0.02
    for layer in range(1, _num_layers(run)):
        yield f"saturation/{layer}", np.clip(start / layer + 0.1 * steps / steps.max(), 0, 1)


def _gradients(run: RunConfig, steps: Any, rng: Any) -> Iterator[tuple[str, Any]]:
    loss = 1.9 if run.norm.name == "none" else 0.1
    layers = _num_layers(run)
    for layer in range(1, layers + 1):
        noise = 0.2 * rng.normal(size=len(steps))
        yield f"grad_norm/{layer}", np.exp(loss * (layer - layers) - steps / steps.max() + noise)


def _smoothness(run: RunConfig, steps: Any, rng: Any) -> Iterator[tuple[str, Any]]:
    rough = 4.0 if run.norm.name == "none" else 1.0
    for metric, size in (
        ("loss_range", 0.2),
        ("gradient_predictiveness", 0.8),
        ("effective_beta", 9.0),
    ):
        yield metric, rough * size * np.exp(0.3 * rng.normal(size=len(steps)))


def _oracle(run: RunConfig, steps: Any, rng: Any) -> Iterator[tuple[str, Any]]:
    size = 0.3 if run.norm.name == "local" else 1e-7 if run.train.precision == "float32" else 1e-15
    for metric in ("loss", "gradient", "buffers", "weights"):
        values = size * (1 + 0.2 * steps) * np.exp(0.5 * rng.normal(size=len(steps)))
        yield (
            f"oracle_gap_{metric}",
            np.where(steps == 0, 0.0 if metric == "weights" else values, values),
        )


_LOOKS = {
    "quantiles": _quantiles,
    "shift": _shift,
    "saturation": _saturation,
    "gradients": _gradients,
    "smoothness": _smoothness,
    "oracle": _oracle,
}


def _finals(run: RunConfig, end: float, points: Points, rng: Any) -> dict[str, float]:
    """What each probe sums up at the end."""
    finals: dict[str, float] = {}
    for name in run.probe.names:
        if name in ("smoothness", "oracle"):
            finals |= {m: max(p.values()) for m, p in points.items() if m.startswith(_OWN[name])}
        finals |= _CONCLUSIONS.get(name, lambda *_: {})(run, end, rng)
    return finals


_OWN = {"smoothness": ("loss_range", "gradient_", "effective_"), "oracle": ("oracle_gap_",)}


def _moved(run: RunConfig, end: float, rng: Any) -> dict[str, float]:
    ratio = (0.74 if run.norm.name == "none" else 0.2) * np.exp(0.1 * rng.normal())
    return {"quantile_range": ratio, "quantile_range_unit0": 1.1 * ratio}


def _slope(run: RunConfig, end: float, rng: Any) -> dict[str, float]:
    return {"shift_slope": (0.12 if run.norm.name == "none" else 0.02) + 0.01 * rng.normal()}


def _population(run: RunConfig, end: float, rng: Any) -> dict[str, float]:
    if normalisation_batch(run) is None:
        return {}
    precise = 0.055 + (end - 0.055) * 0.4
    return {
        "test_error_running": end,
        "test_error_precise": precise,
        "test_error_batch": precise + 0.01,
        "precise_gap": end - precise,
        "running_mean_gap": 0.1,
        "running_var_gap": 0.2,
        "batch_dependence": 1e-6,
    }


def _leak(run: RunConfig, end: float, rng: Any) -> dict[str, float]:
    leaks = run.norm.name == "local" and run.train.shares == "by_class"
    train = 0.01 * np.exp(0.1 * rng.normal())
    later = 0.45 if leaks else train + 0.003
    return {"train_mode_error": train, "eval_mode_error": later, "leak_gap": later - train}


def _exchange(run: RunConfig, end: float, rng: Any) -> dict[str, float]:
    step = (30.0 if run.norm.name != "none" else 24.0) * np.exp(0.03 * rng.normal())
    if run.norm.name != "sync":
        return {"step_ms": step}
    layers = [f"layer{i}.{j}.bn{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
    by_layer = {
        f"exchange_ms/{name}": 0.2 + 0.1 * i % 0.7 for i, name in enumerate(["bn1", *layers])
    }
    total = sum(by_layer.values())
    sent = {
        "exchange_bytes": 38_000.0,
        "exchange_ms": total,
        "exchange_share": total / (step + total),
    }
    return {"step_ms": step + total, **sent, **by_layer}


_CONCLUSIONS = {
    "quantiles": _moved,
    "shift": _slope,
    "population": _population,
    "leak": _leak,
    "exchange": _exchange,
}
