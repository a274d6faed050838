"""Images in folders, a folder a class: `root/train/<class>/*` and `root/test/<class>/*`.

Images are decoded when they are fetched, by the rank itself or by `num_loaders` processes beside it. What is
sent to those is (step, index), so augmentation does not depend on which of them decodes an image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.config import DataConfig
from syncbn.data.augment import Augment
from syncbn.data.prepare import preparation
from syncbn.data.source import Source, Split
from syncbn.errors import DataError
from syncbn.layout import IMAGE_FOLDER, check_files, check_folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Key = tuple[int, int]
"""A step and the index of a sample in it."""


def read_image_folder(cfg: DataConfig, seed: int) -> Source:
    """RGB images, resized and cropped to (3, image_size, image_size); classes are folders by name."""
    del seed
    root = Path(cfg.root).expanduser()
    check_folder(root, IMAGE_FOLDER)
    train, train_classes = _listed(root, "train", cfg)
    test, test_classes = _listed(root, "test", cfg)
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))
        raise DataError(f"class folders of {root}/train and {root}/test differ: {', '.join(odd)}")
    shape = (3, cfg.image_size, cfg.image_size)
    return Source(train, test, len(train_classes), shape, mirrors=True)


@dataclass(frozen=True)
class FileSamples:
    """Samples in files: `files[i]` is of class `labels[i]`; see `DataConfig` for the other fields."""

    files: tuple[Path, ...]
    labels: Tensor
    image_size: int
    binarize: bool
    num_loaders: int

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "FileSamples":
        """The samples at `indices`."""
        files = tuple(self.files[i] for i in indices.tolist())
        return replace(self, files=files, labels=self.labels[indices])

    def split(self, augment: Augment | None) -> Split:
        """A split that decodes each image when it is fetched."""
        return FileSplit(self, augment)


class FileSplit:
    """A split over image files."""

    def __init__(self, samples: FileSamples, augment: Augment | None) -> None:
        self._images = _Images(samples, augment)
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples.labels)

    @property
    def labels(self) -> Tensor:
        """See `Split.labels`."""
        return self._samples.labels

    def batches(
        self, plan: Iterable[Tensor], first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`; loaders read up to two batches each ahead of it.

        Raises:
            DataError: an image cannot be decoded.
        """
        keys = ([(step, i) for i in at.tolist()] for step, at in enumerate(plan, first_step))
        loader = DataLoader(
            self._images,
            batch_sampler=keys,  # pyright: ignore[reportArgumentType]  # any iterable of key lists will do
            num_workers=self._samples.num_loaders,
            collate_fn=self._images.collate,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        try:
            yield from loader
        except DataError as error:  # from a loader process, it comes with that process's traceback
            line = str(error).strip().splitlines()[-1]
            raise DataError(line.removeprefix("syncbn.errors.DataError: ")) from None


class _Images(Dataset[tuple[Tensor, int]]):
    """Decoded, cropped, prepared images by (step, index)."""

    def __init__(self, samples: FileSamples, augment: Augment | None) -> None:
        self._samples = samples
        self._augment = augment
        self._prepare = preparation(samples.binarize, IMAGENET_MEAN, IMAGENET_STD)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        step, index = key
        size = self._samples.image_size
        image = _decoded(self._samples.files[index], size)
        if self._augment is not None:
            image = self._augment.view(image, size, size, step, index)
        return self._prepare(_centre(image, size)), int(self._samples.labels[index])

    def collate(self, items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Images (n, 3, size, size) and labels (n,), also for n = 0."""
        size = self._samples.image_size
        images = torch.stack([x for x, _ in items]) if items else torch.empty(0, 3, size, size)
        return images, torch.tensor([y for _, y in items], dtype=torch.int64)


def _listed(root: Path, part: str, cfg: DataConfig) -> tuple[FileSamples, list[str]]:
    """The image files of `root`/`part` and the names of its classes, in order."""
    from torchvision.datasets import ImageFolder

    check_folder(root / part, IMAGE_FOLDER)
    try:
        found = ImageFolder(root / part)
    except (OSError, ValueError) as error:
        raise DataError(f"{' '.join(str(error).split())} ({IMAGE_FOLDER})") from error
    files = tuple(Path(file) for file, _ in found.samples)
    check_files(files, root, "start again")
    labels = torch.tensor(found.targets, dtype=torch.int64)
    samples = FileSamples(files, labels, cfg.image_size, cfg.binarize, cfg.num_loaders)
    return samples, found.classes


def _decoded(file: Path, size: int) -> Tensor:
    """The image uint8 (3, H, W), its shorter side 8/7 of `size` (256 for 224), as ResNets are evaluated."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    try:
        return resize(pil_to_tensor(pil_loader(str(file))), [-(-size * 8 // 7)])
    except Exception as error:  # Pillow has a dozen types for damaged files
        why = " ".join(str(error).split())
        raise DataError(f"image {file} cannot be decoded ({why}): remove or replace it") from error


def _centre(image: Tensor, size: int) -> Tensor:
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]
