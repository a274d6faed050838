"""One file as an input of a model, prepared as the samples of a data set are.

Data sets of images read any format that Pillow knows. A data set of an extension says itself how a file becomes an
input, by a method `load(path)` of what it builds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.config import DataConfig
from syncbn.data.chance import isolated
from syncbn.data.folder import IMAGENET_MEAN, IMAGENET_STD, FileSamples
from syncbn.data.prepare import preparation
from syncbn.data.torchvision_sets import CIFAR10, FASHION_MNIST, MNIST, Published
from syncbn.data.transforms import Treatment, chosen
from syncbn.errors import DataError, SyncbnError, UsageError
from syncbn.registry import DATA

Read = Callable[[Path], Tensor]
"""The input (C, H, W) in a file."""

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Of the files that are taken from a folder of images."""

_PUBLISHED = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST, "cifar10": CIFAR10}
_DIGITS = Published("digits", (0.0,), (1.0,), mirrors=False)
_SIZES = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "cifar10": 32}
_NAMES = {
    "fashion_mnist": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot",
    "cifar10": "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck",
}


def file_reader(cfg: DataConfig) -> Read:
    """What reads a file as the data set `cfg` would have it; it raises `DataError` with the file's name.

    Raises:
        UsageError: a data set that has no form in files, or a transform that changes inputs with their targets.
    """
    for transform in chosen(cfg.transforms, True):
        if transform.joint:
            raise UsageError(
                f"transform {transform.name} changes inputs together with their targets, which a file does not have"
            )
    if cfg.name == "image_folder":
        return lambda path: _cropped(path, cfg)
    if cfg.name in _SIZES:
        which = _PUBLISHED.get(cfg.name, _DIGITS)
        return lambda path: _fixed(path, which, cfg)
    if cfg.name in DATA.built_in:
        raise UsageError(
            f"data={cfg.name} is made of random numbers: no file can be one of its inputs"
        )
    return _own_reader(cfg)


def class_names(cfg: DataConfig) -> list[str] | None:
    """The classes of the data set `cfg` by name, in their order; None where it does not know them."""
    if cfg.name == "image_folder":
        train = Path(cfg.root) / "train"
        return sorted(path.name for path in train.iterdir() if path.is_dir())
    if cfg.name in _NAMES:
        return _NAMES[cfg.name].split(",")
    if cfg.name in DATA.built_in:
        return None
    names = getattr(_dataset(cfg), "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _dataset(cfg: DataConfig) -> Any:
    """The test split of an extension's data set."""
    entry = DATA[cfg.name]
    return entry.build(Path(cfg.root), "test", **entry.keywords(cfg))


def _own_reader(cfg: DataConfig) -> Read:
    load = getattr(_dataset(cfg), "load", None)
    if not callable(load):
        raise UsageError(
            f"data={cfg.name} does not say how a file becomes an input: give the data set that it builds a method "
            "load(path) -> tensor (channels, height, width)"
        )

    def read(path: Path) -> Tensor:
        try:
            x = torch.as_tensor(load(path))
        except SyncbnError:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"load of data={cfg.name} failed on {path}: {why}") from error
        return _transformed(x, cfg, path)

    return read


def _cropped(path: Path, cfg: DataConfig) -> Tensor:
    """An image of any size as `image_folder` has it."""
    prepare = preparation(cfg.binarize, IMAGENET_MEAN, IMAGENET_STD)
    target = torch.zeros(1, dtype=torch.int64)
    sample = FileSamples((path,), target, cfg.image_size, prepare, ("unknown",))
    return sample.fetch(0, torch.tensor([0]), _treatment(cfg))[0][0]


def _fixed(path: Path, which: Published, cfg: DataConfig) -> Tensor:
    """An image that must be of the data set's own size and channels, standardised as it is."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    image, size = _image(path), _SIZES[which.name]
    if image.size != (size, size):
        width, height = image.size
        raise DataError(
            f"{path} is {width} x {height} pixels: data={which.name} has images of {size} x {size}"
        )
    if image.mode in ("P", "1"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    wanted = "L" if len(which.mean) == 1 else "RGB"
    if image.mode != wanted:
        raise DataError(
            f"{path} is an image of mode {image.mode}: data={which.name} has {wanted}, "
            f"{len(which.mean)} channel(s) of 8 bits"
        )
    pixels = pil_to_tensor(image)
    if which is _DIGITS:  # whose transforms see pixels in [0, 1]
        pixels = pixels / 255
    return preparation(cfg.binarize, which.mean, which.std)(_transformed(pixels, cfg, path))


def _treatment(cfg: DataConfig) -> Treatment:
    """What is done to test samples."""
    return Treatment(transforms=chosen(cfg.transforms, True), by_step=False)


def _transformed(x: Tensor, cfg: DataConfig, path: Path) -> Tensor:
    """`x` after those transforms of `cfg` that test samples go through too."""
    treatment = _treatment(cfg)
    with isolated():
        treatment.seed_for(0, 0)
        return treatment.transformed(x, None, str(path))[0]


def _image(path: Path) -> Any:
    """The decoded image in `path`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow has a dozen types for damaged files
        why = " ".join(str(error).split())
        raise DataError(f"image {path} cannot be decoded ({why})") from error
