"""MNIST, FashionMNIST and CIFAR-10, read by torchvision from its own folder layout.

torchvision says "not found" to every trouble but a few that leave as bare assertions, so files are looked at
before it is called, and whatever it raises becomes one `DataError`. It is imported when a set is read, because
that takes a second or more which digits need not wait for.
"""

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.config import DataConfig
from syncbn.data.memory import TensorSamples
from syncbn.data.prepare import preparation
from syncbn.errors import DataError
from syncbn.layout import PUBLISHED, check_files, check_folder, remedy
from syncbn.registry import DATA


@dataclass(frozen=True)
class Published:
    """A published data set: its torchvision class, its mean and std per channel in [0, 1], its layout.

    Args:
        name: its name in a config, which `PUBLISHED` has class and folder of.
        mirrors: whether a mirrored image still belongs to its class.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrors: bool

    @property
    def class_name(self) -> str:
        """Its class in `torchvision.datasets`."""
        return PUBLISHED[self.name][0]

    @property
    def folder(self) -> str:
        """Where its files lie under data.root."""
        return PUBLISHED[self.name][1]


MNIST = Published("mnist", (0.1307,), (0.3081,), mirrors=False)
FASHION_MNIST = Published("fashion_mnist", (0.2860,), (0.3530,), mirrors=True)
CIFAR10 = Published(
    "cifar10",
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    mirrors=True,
)


@DATA.register("mnist")
def mnist(root: Path, split: str, *, cfg: DataConfig) -> TensorSamples:
    """60 000 training and 10 000 test digits in 10 classes, (1, 28, 28)."""
    return _read(MNIST, root, split, cfg)


@DATA.register("fashion_mnist")
def fashion_mnist(root: Path, split: str, *, cfg: DataConfig) -> TensorSamples:
    """60 000 training and 10 000 test pictures of clothes in 10 classes, (1, 28, 28)."""
    return _read(FASHION_MNIST, root, split, cfg)


@DATA.register("cifar10")
def cifar10(root: Path, split: str, *, cfg: DataConfig) -> TensorSamples:
    """50 000 training and 10 000 test pictures in 10 classes, (3, 32, 32)."""
    return _read(CIFAR10, root, split, cfg)


def _read(which: Published, root: Path, split: str, cfg: DataConfig) -> TensorSamples:
    from torchvision import datasets

    dataset = getattr(datasets, which.class_name)
    _check(which, dataset, root, cfg.download)
    images, labels = _tensors(dataset, root, split == "train")
    prepare = preparation(cfg.binarize, which.mean, which.std)
    return TensorSamples(images, labels, prepare, 10, which.mirrors)


def _check(which: Published, dataset: Any, root: Path, download: bool) -> None:
    """Raise `DataError` unless all files of the data set are there, after a download where one is asked for."""
    folder = root / which.folder
    files = [folder / name for name in _file_names(dataset)]
    if download:
        _download(dataset, root, files)
    how = remedy(which.name)
    check_folder(root, how)
    check_folder(folder, how)
    check_files(files, how)


def _file_names(dataset: Any) -> Sequence[str]:
    """The files that torchvision's class reads, as it lists them itself."""
    if hasattr(dataset, "resources"):
        return [Path(url).stem for url, _ in dataset.resources]
    return [name for name, _ in dataset.train_list + dataset.test_list]


def _tensors(dataset: Any, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of one half of the data set."""
    try:
        half = dataset(root, train=train)
        images, labels = (
            torch.as_tensor(half.data),
            torch.as_tensor(half.targets, dtype=torch.int64),
        )
        images = (
            images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        )
    except Exception as error:  # whatever the parser stumbled over
        raise DataError(_damaged(dataset, root, train, error)) from error
    if len(images) != len(labels):
        raise DataError(
            _damaged(dataset, root, train, f"{len(images)} images but {len(labels)} labels")
        )
    return images, labels


def _damaged(dataset: Any, root: Path, train: bool, reason: object) -> str:
    half = "training" if train else "test"
    why = " ".join(str(reason).split()) or type(reason).__name__
    return f"the {half} files of {dataset.__name__} in {root} are damaged ({why}): remove and fetch them again"


def _download(dataset: Any, root: Path, files: Sequence[Path]) -> None:
    """Fetch the data set where a file of it is missing; ranks of one machine take turns, one fetches.

    A folder that may not be written is left as it is: what it lacks is reported by the checks that follow.
    """
    if root.exists() and not os.access(root, os.W_OK):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".download.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not all(file.exists() for file in files):
                dataset(root, download=True)
    except Exception as error:  # network, archive and file system errors have no common type
        why = " ".join(str(error).split())
        raise DataError(
            f"cannot download {dataset.__name__} into data.root={root}: {why}"
        ) from error
