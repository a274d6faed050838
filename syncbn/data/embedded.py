"""Data sets that need no files: scikit-learn's digits and generated Gaussian classes.

The digits are real (8x8 scans, inside the scikit-learn wheel), so what the project promises can be tried and
tested anywhere. Their split is fixed here once, because scikit-learn ships them unsplit. Their
file is read without importing scikit-learn: the import costs each rank 2 s of a core, the file 8 ms.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from syncbn.config import DataConfig
from syncbn.data.source import Source, TensorSamples, binarized
from syncbn.errors import DataError

NUM_TEST_DIGITS = 500
"""Of 1797 digits; 1297 are left to train on."""


def read_digits(cfg: DataConfig, seed: int) -> Source:
    """1297 training and 500 test digits in 10 classes, (1, 8, 8), pixels in [0, 1] or binarised."""
    del seed
    table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.int64)
    images, labels = table[:, :64], table[:, 64]
    images = torch.from_numpy(images / 16).to(torch.float32).reshape(-1, 1, 8, 8)
    everything = TensorSamples(
        images, torch.from_numpy(labels), binarized if cfg.binarize else _unchanged
    )
    test = torch.from_numpy(stratified(labels, NUM_TEST_DIGITS))
    train = (
        torch.ones(len(labels), dtype=torch.bool).index_fill_(0, test, False).nonzero().flatten()
    )
    return Source(everything.take(train), everything.take(test), 10, (1, 8, 8), mirrors=False)


def _digits_file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads: 64 pixels from 0 to 16 and the label, a line a digit."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(
            "data=digits needs scikit-learn, which is not installed: install syncbn[service]"
        )
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def stratified(labels: np.ndarray, num_chosen: int) -> np.ndarray:
    """Ascending indices of `num_chosen` samples, of each class its share rounded up or down.

    The samples are shuffled by a fixed seed, stably sorted by class, and taken at even distances.
    """
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    positions = (np.arange(num_chosen) + 0.5) * len(labels) / num_chosen
    return np.sort(by_class[positions.astype(np.int64)])


def read_synthetic(cfg: DataConfig, seed: int) -> Source:
    """Gaussian classes: x = mean of its class + N(0, 1), and a quarter as many test samples.

    Class means are N(0, 1/4) on a coarse 4x4 grid, enlarged, so that convolutions can tell classes apart.
    Everything is decided by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (cfg.image_size, cfg.image_size)
    coarse = torch.randn(cfg.num_classes, cfg.channels, 4, 4, generator=generator) / 2
    means = interpolate(coarse, size=size)
    train = _gaussian(means, cfg.num_samples, cfg.binarize, generator)
    test = _gaussian(means, -(-cfg.num_samples // 4), cfg.binarize, generator)
    return Source(train, test, cfg.num_classes, (cfg.channels, *size), mirrors=False)


def _gaussian(
    means: Tensor, num_samples: int, binarize: bool, generator: torch.Generator
) -> TensorSamples:
    labels = torch.randint(len(means), (num_samples,), generator=generator)
    noise = torch.randn(num_samples, *means.shape[1:], generator=generator)
    return TensorSamples(noise.add_(means[labels]), labels, binarized if binarize else _unchanged)


def _unchanged(images: Tensor) -> Tensor:
    return images
