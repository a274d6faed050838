"""Data sets that need no files: scikit-learn's digits and generated Gaussian classes.

The digits are real (8x8 scans, inside the scikit-learn wheel), so what the project promises can be tried and
tested anywhere. Their split is fixed here once, because scikit-learn ships them unsplit. Their
file is read without importing scikit-learn: the import costs each rank 2 s of a core, the file 8 ms.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from syncbn.config import DataConfig
from syncbn.data.memory import TensorSamples, binarized, unchanged
from syncbn.errors import DataError
from syncbn.registry import DATA

NUM_TEST_DIGITS = 500
"""Of 1797 digits; 1297 are left to train on."""


@DATA.register("digits")
def digits(root: Path, split: str, *, cfg: DataConfig) -> TensorSamples:
    """1297 training and 500 test digits in 10 classes, (1, 8, 8), pixels in [0, 1] or binarised."""
    del root
    images, labels = _all_digits()
    prepare = binarized if cfg.binarize else unchanged
    everything = TensorSamples(images, torch.from_numpy(labels), prepare, 10)
    test = torch.from_numpy(stratified(labels, NUM_TEST_DIGITS))
    if split == "test":
        return everything.take(test)
    is_train = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, test, False)
    return everything.take(is_train.nonzero().flatten())


@cache
def _all_digits() -> tuple[Tensor, np.ndarray]:
    """Images float32 (1797, 1, 8, 8) from 0 to 1, and labels."""
    table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.int64)
    images = torch.from_numpy(table[:, :64] / 16)
    return images.to(torch.float32).reshape(-1, 1, 8, 8), table[:, 64]


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


@DATA.register("synthetic")
def synthetic(root: Path, split: str, *, cfg: DataConfig) -> TensorSamples:
    """Gaussian classes: x = mean of its class + N(0, 1), and a quarter as many test samples.

    Class means are N(0, 1/4) on a coarse 4x4 grid, enlarged, so that convolutions can tell classes apart.
    Everything is drawn from torch's global generator: means, training samples, test samples.
    """
    del root
    coarse = torch.randn(cfg.num_classes, cfg.channels, 4, 4) / 2
    means = interpolate(coarse, size=(cfg.image_size, cfg.image_size))
    train = _gaussian(means, cfg.num_samples)
    images, labels = train if split == "train" else _gaussian(means, -(-cfg.num_samples // 4))
    return TensorSamples(
        images, labels, binarized if cfg.binarize else unchanged, num_classes=cfg.num_classes
    )


def _gaussian(means: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Images (num_samples, *) and classes of samples around `means` (num_classes, *)."""
    labels = torch.randint(len(means), (num_samples,))
    noise = torch.randn(num_samples, *means.shape[1:])
    return noise.add_(means[labels]), labels
