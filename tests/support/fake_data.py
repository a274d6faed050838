"""Tiny data sets on disk, in the layouts of the real ones."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def write_idx(file: Path, array: np.ndarray) -> None:
    """Write uint8 `array` in MNIST's idx format: magic number, sizes (big endian), bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(
    root: Path, folder: str = "MNIST", num_train: int = 20, num_test: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Write an MNIST of random images under `root`; returns its training images and labels."""
    rng = np.random.default_rng(0)
    written = []
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(root / folder / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        written.append((images, labels))
    return written[0]


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write a CIFAR-10 of 4 images a file under `root` and have torchvision expect its checksums.

    Returns:
        the 20 training images uint8 (20, 3, 32, 32).
    """
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    sums = [
        [name, _write_pickle(root, name, {"data": data, "labels": [0, 1, 2, 3]})]
        for name, data in zip(names, images, strict=True)
    ]
    meta = _write_pickle(root, "batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return images[:5].reshape(20, 3, 32, 32)


def _write_pickle(root: Path, name: str, content: object) -> str:
    file = root / "cifar-10-batches-py" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> None:
    """Write `each` PNG images of 20x24 random pixels a class, for train and test."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def fetch(split, *indices: int, first_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of `split`: its samples at `indices`."""
    plan = [torch.tensor(indices, dtype=torch.int64)]
    return next(iter(split.batches(plan, first_step)))
