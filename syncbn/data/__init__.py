"""Data sets by name, ready to be cut into batches.

A split is asked for batches by sample *index* and knows nothing of ranks, epochs or order. Those belong to
`syncbn.sampling`, so a sample looks the same whichever rank fetches it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.config import DataConfig
from syncbn.data import embedded, folder, torchvision_sets  # noqa: F401 - they register their data sets
from syncbn.data.augment import Augment
from syncbn.data.loaders import Loading
from syncbn.data.registered import read
from syncbn.data.source import Split
from syncbn.data.transforms import Treatment, chosen
from syncbn.errors import DataError, UsageError
from syncbn.registry import DATA

__all__ = ["DataSets", "Split", "kept_in_memory", "load_data"]

Collate = Callable[[list[tuple[Tensor, Any]]], tuple[Any, Any]]
"""Makes a batch of samples, which are (input, target)."""


@dataclass(frozen=True)
class DataSets:
    """What a run trains on and is measured on; one image is `shape` = (C, H, W)."""

    train: Split
    test: Split
    num_classes: int
    shape: tuple[int, int, int]


def load_data(
    cfg: DataConfig, seed: int, pin_memory: bool = False, collate: Collate | None = None
) -> DataSets:
    """The data set that `cfg` names.

    Which samples are the test set, are held out (`validation`) or left out (`limit`) is fixed once for all
    seeds. With `validation`, `.test` is the held-out part of the training samples; the test set is not used.

    Args:
        cfg: which data set, and how it is prepared.
        seed: decides augmentation, transforms, and what a data set draws at random.
        pin_memory: hand batches over in page-locked memory, unless `cfg` says otherwise.
        collate: makes a batch of samples, where they are not just stacked.

    Raises:
        DataError: a data set that is missing, damaged or too small for `limit` or `validation`, or whose samples are
            not what they must be.
        UsageError: what `cfg` asks for is not possible with this data set.
    """
    loading = Loading(cfg.num_loaders, pin_memory if cfg.pin_memory is None else cfg.pin_memory)
    if _kept is None or collate is not None:
        return _load(cfg, seed, loading, collate)
    key = repr((cfg, loading, seed if _is_random(cfg) else None))
    if key not in _kept:
        _kept.clear()  # one at a time: MNIST takes 220 MB
        _kept[key] = _load(cfg, seed, loading)
    return _kept[key]


def _is_random(cfg: DataConfig) -> bool:
    """Whether samples may depend on the run's seed."""
    fixed = cfg.name in DATA.built_in and cfg.name != "synthetic"
    return not fixed or cfg.augment or bool(cfg.transforms)


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


def _load(cfg: DataConfig, seed: int, loading: Loading, collate: Collate | None = None) -> DataSets:
    if cfg.augment and cfg.name not in DATA.built_in:
        raise UsageError(
            f"data.augment=true is not allowed with data={cfg.name}: an extension varies its images itself, or by a "
            "transform of its own"
        )
    of_train, of_test = read(cfg, seed)
    num_classes = of_train.num_classes
    assert num_classes is not None
    if cfg.limit is not None or cfg.validation:
        kept, held_out = hold_out(len(of_train), cfg.validation, cfg.limit)
        of_test = of_train.take(held_out) if cfg.validation else of_test
        of_train = of_train.take(kept)
    augment = Augment(seed, of_train.mirrors) if cfg.augment else None
    on_train = Treatment(seed, augment, chosen(cfg.transforms, False), collate=collate)
    on_test = Treatment(seed, None, chosen(cfg.transforms, True), by_step=False, collate=collate)
    train, test = of_train.split(on_train, loading), of_test.split(on_test, loading)
    return DataSets(train, test, num_classes, _image_shape(cfg, train, test))


def _image_shape(cfg: DataConfig, train: Split, test: Split) -> tuple[int, int, int]:
    """(C, H, W) of every input."""
    if len(train.shape) != 3:
        raise DataError(
            f"data={cfg.name}: inputs have shape {train.shape}: (channels, height, width) is needed"
        )
    if train.shape != test.shape:
        raise DataError(
            f"data={cfg.name}: training and test images differ in size, {train.shape} and {test.shape}: make them "
            "equal; a transform that changes sizes must be registered with on_test=True"
        )
    channels, height, width = train.shape
    return channels, height, width


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
