"""The optimiser of a run and its learning rate.

The learning rate is a pure function of the step, set by the training loop before each step. There is no scheduler,
whose state would have to be saved and restored.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from syncbn.config import OptimConfig
from syncbn.errors import UsageError
from syncbn.registry import OPTIMIZERS
from syncbn.sharded import is_sharded


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """The optimiser that `cfg` names, over all parameters of `model`.

    With weight decay, norm parameters and biases are a second group without it, unless `decay_norm_and_bias`:
    the scale of weights before a norm changes nothing but the effective learning rate, that of its own
    parameters does (He et al. 2019, "Bag of tricks", 3.1).

    Raises:
        UsageError: what an extension registered is no optimiser, or one that needs a closure; see `parameter_groups`.
    """
    entry = OPTIMIZERS[cfg.name]
    optimizer = entry.build(parameter_groups(model, cfg), cfg.lr, **entry.keywords(cfg))
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"optim={cfg.name} is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer"
        )
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"optim={cfg.name} is a {type(optimizer).__name__}, whose step needs a closure: a run computes each "
            "gradient once, so take an optimizer whose step() needs none"
        )
    return optimizer


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups with their `weight_decay`: one, or those that decay and those that do not.

    Norm parameters and biases are those of at most one dimension, whatever class of norm they belong to. Those that
    fit a pattern of `optim.groups` follow as groups of their own, with their `lr_scale`.

    Raises:
        UsageError: no parameter to train; a pattern that fits none, or none that an earlier one does not fit.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise UsageError(
            f"a model without a parameter that requires a gradient cannot be trained: {type(model).__name__}"
        )
    fitting = _by_pattern(list(named), cfg)
    groups = _by_decay([named[name] for name in fitting.pop(None, [])], cfg)
    for pattern, names in fitting.items():
        special = cfg.groups[str(pattern)]
        parameters = [named[name] for name in names]
        parts = _by_decay(parameters, cfg)
        if special.weight_decay is not None:
            parts = [{"params": parameters, "weight_decay": special.weight_decay}]
        groups += [part | {"lr_scale": special.lr_scale} for part in parts]
    return [group for group in groups if group["params"]]


def _by_pattern(names: list[str], cfg: OptimConfig) -> dict[str | None, list[str]]:
    """`names` by the first pattern of `cfg.groups` that fits each; None is the pattern of those that fit none."""
    fitting: defaultdict[str | None, list[str]] = defaultdict(list)
    for name in names:
        fitting[next((p for p in cfg.groups if fnmatchcase(name, p)), None)].append(name)
    for pattern in cfg.groups:
        if pattern not in fitting:
            raise UsageError(
                f"optim.groups: pattern {pattern!r} is not allowed: it must fit a parameter that no earlier pattern "
                f"fits, such as {names[0]!r}"
            )
    return {pattern: fitting[pattern] for pattern in (None, *cfg.groups) if pattern in fitting}


def _by_decay(parameters: list[nn.Parameter], cfg: OptimConfig) -> list[dict[str, Any]]:
    """`parameters` as one group, or as those that decay and those that do not."""
    if not cfg.weight_decay or cfg.decay_norm_and_bias:
        return [{"params": parameters, "weight_decay": cfg.weight_decay}]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _fused(groups: list[dict[str, Any]]) -> bool:
    """Whether one kernel takes the step.

    Fused steps are elementwise, so as deterministic as the others, and fastest on the CPU too (one thread, 64-100-
    100-10 MLP with norms): SGD 27 us against 57 us (foreach) and 70 us (plain), Adam 65 against 185 and 250 us. Torch
    has none of SGD for parameters that are sharded over ranks.
    """
    return not any(is_sharded(one) for group in groups for one in group["params"])


@OPTIMIZERS.register("sgd")
def _sgd(groups: list[dict[str, Any]], lr: float, *, cfg: OptimConfig) -> Optimizer:
    return SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=_fused(groups))


@OPTIMIZERS.register("adam")
def _adam(groups: list[dict[str, Any]], lr: float, *, cfg: OptimConfig) -> Optimizer:
    """`optim.momentum` is the first beta, as of AdamW."""
    return Adam(groups, lr=lr, betas=(cfg.momentum, 0.999), fused=_fused(groups))


@OPTIMIZERS.register("adamw")
def _adamw(groups: list[dict[str, Any]], lr: float, *, cfg: OptimConfig) -> Optimizer:
    return AdamW(groups, lr=lr, betas=(cfg.momentum, 0.999), fused=_fused(groups))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Let the next step of `optimizer` have the learning rate `rate`, in each group times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def learning_rate(step: int, cfg: OptimConfig, steps: int, global_batch: int) -> float:
    """The learning rate of `step` (counted from 0) in a run of `steps`.

    peak = lr x scaling(global_batch / base_batch). In the warm-up it is peak (step + 1) / warmup_steps, after
    it peak x the schedule's factor.
    """
    peak = cfg.lr * _scaling(cfg.lr_scaling, global_batch / cfg.base_batch)
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    return peak * SCHEDULES[cfg.schedule](step, cfg, steps)


def _scaling(rule: str, ratio: float) -> float:
    """What larger batches do to the rate: linear (Goyal et al. 2017), sqrt (Krizhevsky 2014) or nothing."""
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


def _constant(step: int, cfg: OptimConfig, steps: int) -> float:
    del step, cfg, steps
    return 1.0


def _cosine(step: int, cfg: OptimConfig, steps: int) -> float:
    """Half a cosine from 1 after the warm-up to 0 at the end (Loshchilov & Hutter 2017, without restarts)."""
    done = (step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _step(step: int, cfg: OptimConfig, steps: int) -> float:
    """Times gamma at each milestone, a share of the whole budget, warm-up included."""
    return cfg.gamma ** sum(step >= share * steps for share in cfg.milestones)


def _exponential(step: int, cfg: OptimConfig, steps: int) -> float:
    """Times gamma over every `decay_steps` after the warm-up, a little in each step."""
    del steps
    return cfg.gamma ** ((step - cfg.warmup_steps) / cfg.decay_steps)


SCHEDULES: dict[str, Callable[[int, OptimConfig, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": _step,
    "exponential": _exponential,
}
"""The factor on the peak rate of a schedule's name, given a step after the warm-up, the config and the budget."""
