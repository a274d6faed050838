"""Data sets by name, ready to be cut into batches.

A split is asked for batches by sample *index* and knows nothing of ranks, epochs or order. Those belong to
`syncbn.sampling`, so a sample looks the same whichever rank fetches it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from syncbn.config import DataConfig
from syncbn.data.augment import Augment
from syncbn.data.embedded import read_digits, read_synthetic
from syncbn.data.folder import read_image_folder
from syncbn.data.registered import read_registered
from syncbn.data.source import Source, Split
from syncbn.data.torchvision_sets import read_cifar10, read_fashion_mnist, read_mnist
from syncbn.errors import DataError, UsageError

__all__ = ["DataSets", "Split", "kept_in_memory", "load_data"]

READERS: dict[str, Callable[[DataConfig, int], Source]] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "image_folder": read_image_folder,
    "synthetic": read_synthetic,
}
"""What reads the data set of a name, given its config and the run's seed (only `synthetic` depends on it)."""


@dataclass(frozen=True)
class DataSets:
    """What a run trains on and is measured on; one image is `shape` = (C, H, W)."""

    train: Split
    test: Split
    num_classes: int
    shape: tuple[int, int, int]


def load_data(cfg: DataConfig, seed: int) -> DataSets:
    """The data set that `cfg` names.

    Which samples are the test set, are held out (`validation`) or left out (`limit`) is fixed once for all
    seeds. With `validation`, `.test` is the held-out part of the training samples; the test set is not used.

    Args:
        cfg: which data set, and how it is prepared.
        seed: decides augmentation, and the samples of `synthetic`.

    Raises:
        DataError: a data set that is missing, damaged or too small for `limit` or `validation`.
    """
    if _kept is None:
        return _load(cfg, seed)
    key = repr((cfg, seed if cfg.augment or cfg.name == "synthetic" else None))
    if key not in _kept:
        _kept.clear()  # one at a time: MNIST takes 220 MB
        _kept[key] = _load(cfg, seed)
    return _kept[key]


@contextmanager
def kept_in_memory() -> Iterator[None]:
    """Within, `load_data` reads a data set once for all runs that follow each other on it (MNIST: 0.4 s a run)."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


_kept: dict[str, DataSets] | None = None


def _load(cfg: DataConfig, seed: int) -> DataSets:
    if cfg.name in READERS:
        source = READERS[cfg.name](cfg, seed)
        for part, samples in (("training", source.train), ("test", source.test)):
            _check_labels(samples.labels, source.num_classes, f"{cfg.name}: {part}")
    else:
        source = read_registered(cfg)
    train, test = source.train, source.test
    if cfg.limit is not None or cfg.validation:
        kept, held_out = hold_out(len(train), cfg.validation, cfg.limit)
        train = source.train.take(kept)
        test = source.train.take(held_out) if cfg.validation else source.test
    if cfg.augment and cfg.name not in READERS:
        raise UsageError(
            f"data.augment=true is not allowed with data={cfg.name}: an extension varies its images itself"
        )
    augment = Augment(seed, source.mirrors) if cfg.augment else None
    return DataSets(train.split(augment), test.split(None), source.num_classes, source.shape)


def hold_out(num_samples: int, share: float, limit: int | None) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, both ascending, drawn by a rule that no seed changes.

    What is held out does not depend on `limit`, so runs on few and on many samples are measured alike.

    Raises:
        DataError: nothing to train on, nothing held out, or fewer than `limit` samples left.
    """
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_samples))
    num_held_out = round(num_samples * share)
    left = num_samples - num_held_out
    if share and not 0 < num_held_out < num_samples:
        raise DataError(
            f"data.validation={share:g} of {num_samples} training samples holds out {num_held_out}: "
            f"it must leave some on either side"
        )
    if limit is not None and limit > left:
        raise DataError(f"data.limit={limit} is not allowed: there are {left} training samples")
    kept = order[num_held_out:][:limit]
    return kept.sort().values, order[:num_held_out].sort().values


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise `DataError` for a label outside 0 to `num_classes` - 1."""
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{what} sample {first} has label {int(labels[first])}: allowed are 0 to {num_classes - 1}"
        )
