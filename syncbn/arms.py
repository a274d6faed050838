"""The arms of a comparison: what replaces the batch norm of a model.

Arms are made by replacing the norms of a model that is already built. That draws no random numbers and leaves every
other weight alone, so arms differ in the norm and in nothing else. Parameters and statistics keep their names in the
state dict wherever the arm has them.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.config import NormConfig
from syncbn.errors import UsageError
from syncbn.norm import convert_sync_batchnorm
from syncbn.virtual import Ranks, VirtualBatchNorm, virtual_ranks


def apply_arm(model: nn.Module, cfg: NormConfig, num_virtual: int | None = None) -> nn.Module:
    """`model` with every BatchNorm1d/2d/3d replaced by the arm `cfg`, with its eps and momentum.

    Weights, biases, statistics, modes and sharing of the replaced layers are kept; `model` is changed in place.

    Args:
        model: a network with torch's batch norm.
        cfg: the arm.
        num_virtual: ranks that this process stands for (`syncbn.virtual`); None where it is one rank itself.

    Returns:
        `model`, or what replaced it where it is a BatchNorm itself.

    Raises:
        UsageError: a model without batch norm (any arm but `none`), an arm that cannot run here, or group norm
            with groups of one value.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers and cfg.name != "none":
        raise UsageError(
            f"norm={cfg.name} has nothing to replace: this {type(model).__name__} has no batch norm; "
            "use norm=none or another model"
        )
    for layer in layers:
        layer.eps, layer.momentum = cfg.eps, cfg.momentum
    if num_virtual is not None:
        return _virtual(model, cfg, num_virtual)
    return ARM_MAKERS[cfg.name](model, cfg)


def replace_batch_norm(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """`model` with each BatchNorm replaced by what `make` gives for it; a layer used twice stays one layer."""
    made: dict[nn.Module, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, _BatchNorm):
            if module not in made:
                made[module] = make(module).train(module.training)
            return made[module]
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    return replaced(model)


def num_channel_groups(num_features: int, at_most: int) -> int:
    """The largest divisor of `num_features` that is no larger than `at_most`."""
    return max(n for n in range(1, at_most + 1) if num_features % n == 0)


class GhostBatchNorm(VirtualBatchNorm):
    """Batch norm over small parts ("ghosts") of a batch, on one rank (Hoffer, Hubara & Soudry 2017).

    They found that large batches generalise as well as small ones when the statistics still come from few
    samples: the noise of small-batch statistics regularises. Here it also tells two effects apart: a ghost arm
    has the *noise* of ranks with few samples, but none of their other traits.

    In training, the batch is cut into consecutive parts of `ghost_size` samples, each normalised by itself; a
    remainder joins the last part. The running statistics move once a step, towards the mean over parts of their
    means and unbiased variances. (Hoffer et al. move them once a part, which depends on the parts' order.) In
    evaluation it is plain batch norm. State dict keys are those of `torch.nn.BatchNorm*d`.

    Args:
        num_features: channels C of the input (N, C, *).
        ghost_size: samples in a part, at least 2.
        eps: as for `torch.nn.BatchNorm2d`.
        momentum: as for `torch.nn.BatchNorm2d`, but never None.

    Raises:
        ValueError: `ghost_size` below 2.
    """

    def __init__(
        self, num_features: int, ghost_size: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        if ghost_size < 2:
            raise ValueError(f"ghost_size={ghost_size} is not allowed: a whole number >= 2")
        super().__init__(num_features, Ranks(1, ghost_size=ghost_size), eps, momentum)


def _none(model: nn.Module, cfg: NormConfig) -> nn.Module:
    del cfg
    return replace_batch_norm(model, lambda _: nn.Identity())


def _batch_norm(model: nn.Module, cfg: NormConfig) -> nn.Module:
    """Torch's own layers stay; what becomes of their buffers across ranks is the training loop's part."""
    del cfg
    return model


def _sync(model: nn.Module, cfg: NormConfig) -> nn.Module:
    del cfg
    return convert_sync_batchnorm(model, strict=True)


def _sync_group(model: nn.Module, cfg: NormConfig) -> nn.Module:
    return convert_sync_batchnorm(model, process_group=cfg.group_size, strict=True)


def _torch_sync(model: nn.Module, cfg: NormConfig) -> nn.Module:
    del cfg
    if not torch.cuda.is_available():
        raise UsageError(
            "norm=torch_sync is not allowed here: torch.nn.SyncBatchNorm runs on CUDA devices only; use norm=sync"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _group_norm(model: nn.Module, cfg: NormConfig) -> nn.Module:
    def make(layer: _BatchNorm) -> nn.Module:
        num_groups = num_channel_groups(layer.num_features, cfg.num_groups)
        if num_groups == layer.num_features and isinstance(layer, nn.BatchNorm1d):
            raise UsageError(
                f"norm.num_groups={cfg.num_groups} leaves groups of one value in a layer of {num_groups} features, "
                f"which would make its output constant: use norm.num_groups <= {num_groups // 2}"
            )
        group_norm = nn.GroupNorm(num_groups, layer.num_features, cfg.eps)
        return _with_affine_of(layer, group_norm)

    return replace_batch_norm(model, make)


def _ghost(model: nn.Module, cfg: NormConfig) -> nn.Module:
    def make(layer: _BatchNorm) -> nn.Module:
        return _with_state_of(
            layer, GhostBatchNorm(layer.num_features, cfg.ghost_size, cfg.eps, cfg.momentum)
        )

    return replace_batch_norm(model, make)


def _virtual(model: nn.Module, cfg: NormConfig, num_ranks: int) -> nn.Module:
    """What `num_ranks` ranks do together in one process; torch's own layer where that is what it does."""
    ranks = virtual_ranks(cfg, num_ranks)
    if ranks is None:
        return model if cfg.name == "sync" else ARM_MAKERS[cfg.name](model, cfg)

    def make(layer: _BatchNorm) -> nn.Module:
        virtual = VirtualBatchNorm(layer.num_features, ranks, cfg.eps, cfg.momentum)
        return _with_state_of(layer, virtual)

    return replace_batch_norm(model, make)


def _with_state_of(layer: _BatchNorm, norm: _BatchNorm) -> nn.Module:
    """`norm` with the running statistics, weight and bias of `layer`, the very same tensors."""
    norm.running_mean, norm.running_var = layer.running_mean, layer.running_var
    norm.num_batches_tracked = layer.num_batches_tracked
    return _with_affine_of(layer, norm)


def _with_affine_of(layer: _BatchNorm, norm: nn.Module) -> nn.Module:
    """`norm` with the weight and bias of `layer`, the very same parameters."""
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm


ARM_MAKERS: dict[str, Callable[[nn.Module, NormConfig], nn.Module]] = {
    "none": _none,
    "local": _batch_norm,
    "local_avg": _batch_norm,
    "big_batch": _batch_norm,
    "sync": _sync,
    "sync_group": _sync_group,
    "torch_sync": _torch_sync,
    "group_norm": _group_norm,
    "ghost": _ghost,
}
"""What makes each arm of `syncbn.config.ARMS` out of a model whose norms have the arm's eps and momentum."""
