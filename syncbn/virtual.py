"""Virtual ranks: one process normalises a global batch as many ranks would together, each arm in its way.

A batch norm here differs from torch's only in which samples share statistics (groups of consecutive samples, cut as
`syncbn.sampling` cuts a batch for ranks) and in whose running statistics it keeps. All arms are such cuts, so one layer
stands for all of them. The rest follows without code: the loss of the one process is the mean over the global batch,
and its gradient is what DistributedDataParallel averages to.

Results of virtual ranks hold for real ones because `tests/models/test_virtual_on_ranks.py` holds both to equal weights,
running statistics and test errors over 20 steps in float64, for every arm. One thing is not held equal: dropout draws
one stream of random numbers here, and one a rank there.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.config import NormConfig
from syncbn.errors import UsageError
from syncbn.sampling import share_sizes

MANY_GROUPS = 6
SMALL = 2**16
"""From so many groups on, an input of fewer values is normalised at once, its groups laid side by side as channels.

Forward and backward on one thread of a Xeon, at once against group by group: 201 us against 247 for (16, 100) in 8
groups, 196 against 171 in 4 (plain batch norm: 61); 250 against 739 for (64, 100) in 32. Rearranging a large input
costs more than the calls it saves: 2630 us against 1800 for (64, 32, 14, 14) in 8 groups (plain: 1500).
"""


@dataclass(frozen=True)
class Ranks:
    """The ranks that one process stands for, and which of their samples share statistics."""

    num_ranks: int
    together: int = 1
    """Consecutive ranks that share statistics."""
    ghost_size: int | None = None
    """Samples of a rank that share statistics; none means all of its share."""
    averaged: bool = False
    """Running statistics are the mean over all groups, not those of rank 0."""


@dataclass(frozen=True)
class Groups:
    """A batch cut into consecutive samples that share statistics."""

    sizes: tuple[int, ...]
    num_owners: int
    """The first so many groups move the running statistics, by their mean."""

    @property
    def equal(self) -> bool:
        """Whether all groups have as many samples."""
        return min(self.sizes) == max(self.sizes)


def virtual_ranks(cfg: NormConfig, num_ranks: int) -> Ranks | None:
    """What `num_ranks` ranks share in the arm `cfg`; None for an arm in which one process does as they do already.

    That is so for an arm without batch norm, and for one whose statistics are those of the whole batch.
    """
    return {
        "local": Ranks(num_ranks),
        "local_avg": Ranks(num_ranks, averaged=True),
        "sync_group": Ranks(num_ranks, together=cfg.group_size or num_ranks),
        "ghost": Ranks(num_ranks, ghost_size=cfg.ghost_size),
    }.get(cfg.name)


@lru_cache(maxsize=256)
def groups_of(ranks: Ranks, num_samples: int) -> Groups:
    """How `ranks` cut a batch of `num_samples`, those of rank 0 first.

    Raises:
        UsageError: a batch that leaves ranks empty whose running statistics are to be averaged, because theirs would
            have to be kept apart.
    """
    shares = share_sizes(num_samples, ranks.num_ranks)
    if ranks.ghost_size is not None:
        parts = [ghost_sizes(share, ranks.ghost_size) for share in shares]
        return Groups(tuple(size for part in parts for size in part), len(parts[0]))
    if ranks.averaged and 0 in shares:
        raise UsageError(
            f"a batch of {num_samples} samples is too small for norm=local_avg on {len(shares)} virtual ranks: "
            "each must get a sample; use train.drop_last=true or train.virtual=false"
        )
    starts = range(0, len(shares), ranks.together)
    sizes = tuple(sum(shares[start : start + ranks.together]) for start in starts)
    return Groups(sizes, len(sizes) if ranks.averaged else 1)


def ghost_sizes(num_samples: int, ghost_size: int) -> list[int]:
    """Sizes of the ghosts of a rank's share: `ghost_size` each, but for the last, which also takes the remainder."""
    num_parts = max(num_samples // ghost_size, 1)
    return [ghost_size] * (num_parts - 1) + [num_samples - ghost_size * (num_parts - 1)]


class VirtualBatchNorm(_BatchNorm):
    """Batch norm of a whole global batch as several ranks would do it together.

    In training each group of samples (see `Ranks`) is normalised by itself. The running statistics move once a step,
    to what the rank or ranks that own them would hold. In evaluation it is plain batch norm. State dict keys are those
    of `torch.nn.BatchNorm*d`.

    Args:
        num_features: channels C of the input (N, C, *), N being the samples of all ranks.
        ranks: which samples share statistics.
        eps: as for `torch.nn.BatchNorm2d`.
        momentum: as for `torch.nn.BatchNorm2d`, but never None.
    """

    momentum: float

    def __init__(
        self, num_features: int, ranks: Ranks, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.ranks = ranks

    def extra_repr(self) -> str:
        """As for batch norm, with the ranks."""
        return f"{super().extra_repr()}, {self.ranks}"

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, C, *), normalised.

        Raises:
            ValueError: in training, a group with one value per channel.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if not self.training:
            return batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        groups = groups_of(self.ranks, len(x))
        _require_two_values(x, groups)
        self.num_batches_tracked.add_(1)
        at_once = len(groups.sizes) >= MANY_GROUPS and x.numel() < SMALL and groups.equal
        normalise = self._at_once if at_once else self._one_by_one
        return normalise(x, groups, self.running_mean, self.running_var)

    def _one_by_one(
        self, x: Tensor, groups: Groups, running_mean: Tensor, running_var: Tensor
    ) -> Tensor:
        """Group by group; a group without samples moves nothing, as on a rank without any."""
        owners = groups.num_owners
        if owners == 1:
            means, variances = [running_mean], [running_var]
        else:
            means, variances = running_mean.repeat(owners, 1), running_var.repeat(owners, 1)
        y = []
        for number, part in enumerate(x.split(groups.sizes)):
            moved = (means[number], variances[number]) if number < owners else (None, None)
            y.append(self._normalised(part, self.weight, self.bias, *moved, self.momentum))
        if isinstance(means, Tensor) and isinstance(variances, Tensor):
            # (1 - momentum) running + momentum mean_k(group k), because each row moved from the same start.
            running_mean.copy_(means.mean(0))
            running_var.copy_(variances.mean(0))
        return torch.cat(y)

    def _at_once(
        self, x: Tensor, groups: Groups, running_mean: Tensor, running_var: Tensor
    ) -> Tensor:
        """Groups of n samples (G, n, C, *) laid side by side as channels (n, G C, *)."""
        G, n, C = len(groups.sizes), groups.sizes[0], self.num_features
        beside = x.reshape(G, n, C, *x.shape[2:]).transpose(0, 1).reshape(n, G * C, *x.shape[2:])
        mean, var = running_mean.new_zeros(G * C), running_var.new_zeros(G * C)
        weight, bias = _times(G, self.weight), _times(G, self.bias)
        y = self._normalised(beside, weight, bias, mean, var, 1.0)  # mean and var of this batch
        running_mean.lerp_(_mean_of_first(groups.num_owners, C, mean), self.momentum)
        running_var.lerp_(_mean_of_first(groups.num_owners, C, var), self.momentum)
        return y.view(n, G, C, *x.shape[2:]).transpose(0, 1).reshape(x.shape)

    def _normalised(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float,
    ) -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, var, True, momentum, self.eps, cudnn)


def _times(num_groups: int, parameter: Tensor | None) -> Tensor | None:
    """`parameter` (C,) for each of the groups, (G C,)."""
    if parameter is None:
        return None
    return parameter.expand(num_groups, len(parameter)).reshape(-1)


def _mean_of_first(num_owners: int, C: int, statistic: Tensor) -> Tensor:
    """The mean `(C,)` over the first groups of `statistic` (G C,)."""
    if num_owners == 1:
        return statistic[:C]
    return statistic[: num_owners * C].view(num_owners, C).mean(0)


def _require_two_values(x: Tensor, groups: Groups) -> None:
    """Raise `ValueError` in torch's words for a group with one value per channel."""
    if 1 in groups.sizes and x.numel() == x.shape[0] * x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x[:1].shape}"
        )
