"""Images in folders, a folder a class: `root/train/<class>/*` and `root/test/<class>/*`.

Images are decoded when they are fetched, and standardised a batch at a time. JPEGs are decoded by torchvision, in
40% of the time that Pillow takes and to the same pixels; all else, and what torchvision cannot decode, by Pillow. Links
are followed, since large data sets are laid out as links to shared storage.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from syncbn.config import DataConfig
from syncbn.data.chance import isolated
from syncbn.data.prepare import preparation
from syncbn.data.source import Samples
from syncbn.data.transforms import Treatment
from syncbn.errors import DataError
from syncbn.layout import IMAGE_FOLDER, check_files, check_folder
from syncbn.registry import DATA

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_JPEG = b"\xff\xd8"


@dataclass(frozen=True)
class FileSamples(Samples):
    """Samples in files: `files[i]` is of class `targets[i]`.

    Args:
        files: paths.
        targets: int64 (N,).
        image_size: height and width of an image.
        prepare: images uint8 (n, 3, H, W) to what the model sees, float32.
        classes: their names.
        what: see `Samples`.
    """

    files: tuple[Path, ...]
    targets: Tensor
    image_size: int
    prepare: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]
    what: str = "data"
    num_classes: int | None = None
    mirrors: bool = True

    def __post_init__(self) -> None:
        """Count the classes."""
        object.__setattr__(self, "num_classes", len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Tensor:
        """See `Samples.labels`."""
        return self.targets

    def target(self) -> Tensor:
        """See `Samples.target`."""
        return self.targets[0]

    def take(self, indices: Tensor) -> "FileSamples":
        """The samples at `indices`."""
        files = tuple(self.files[i] for i in indices.tolist())
        return replace(self, files=files, targets=self.targets[indices])

    def name(self, index: int) -> str:
        """Called by its file."""
        return f"image {self.files[index]}"

    def fetch(self, step: int, indices: Tensor, treatment: Treatment) -> tuple[Tensor, Tensor]:
        """See `Samples.fetch`.

        Raises:
            DataError: an image that cannot be decoded.
        """
        images = [self._image(step, index, treatment) for index in indices.tolist()]
        targets = self.targets.index_select(0, indices)
        if not treatment.transforms:
            return self.prepare(torch.stack(images)), targets
        samples = zip(indices.tolist(), images, targets, strict=True)
        with isolated():
            treated = treatment.all_transformed(samples, step, self.name)
        stack, targets = treatment.stacked(treated, indices, self.name)
        return self.prepare(stack), targets

    def _image(self, step: int, index: int, treatment: Treatment) -> Tensor:
        """An image uint8 (3, image_size, image_size): its centre, or a crop of it."""
        size = self.image_size  # of 256 pixels for 224, as ResNets are evaluated
        image = _resized(self._decoded(index), -(-size * 8 // 7))
        if treatment.augment is not None:
            return treatment.augment.view(image, size, size, step, index)
        return _centre(image, size)

    def _decoded(self, index: int) -> Tensor:
        """The image uint8 (3, H, W)."""
        try:
            return _decoded(self.files[index].read_bytes())
        except Exception as error:  # Pillow has a dozen types for damaged files
            why = " ".join(str(error).split())
            raise DataError(
                f"{self.name(index)} cannot be decoded ({why}): remove or replace it"
            ) from error


@DATA.register("image_folder")
def image_folder(root: Path, split: str, *, cfg: DataConfig) -> FileSamples:
    """RGB images, resized and cropped to (3, image_size, image_size); classes are folders by name."""
    from torchvision.datasets import ImageFolder

    check_folder(root, IMAGE_FOLDER)
    check_folder(root / split, IMAGE_FOLDER)
    try:
        found = ImageFolder(root / split)
    except (OSError, ValueError) as error:
        raise DataError(f"{' '.join(str(error).split())} ({IMAGE_FOLDER})") from error
    files = tuple(Path(file) for file, _ in found.samples)
    check_files(files, "start again")
    labels = torch.tensor(found.targets, dtype=torch.int64)
    prepare = preparation(cfg.binarize, IMAGENET_MEAN, IMAGENET_STD)
    return FileSamples(files, labels, cfg.image_size, prepare, tuple(found.classes))


def _decoded(content: bytes) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    decode = _jpeg_decoder() if content.startswith(_JPEG) else None
    if decode is not None:
        try:
            return decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        except RuntimeError:
            pass  # Pillow can tell better what is wrong, if anything is
    return pil_to_tensor(as_rgb(Image.open(BytesIO(content))))


def as_rgb(image: "Image") -> "Image":
    """`image` upright, in 8 bits a channel: 16 bits are scaled, transparent pixels lie on white.

    Raises:
        ValueError: values whose range is not known.
    """
    from PIL import Image, ImageOps

    form, mode = image.format, image.mode
    image = ImageOps.exif_transpose(image)
    if mode.startswith("I;16") or (mode == "I" and form == "PPM"):  # Pillow scales these to 16 bits
        sixteen = np.asarray(image).astype(np.int64)
        return Image.fromarray(((sixteen + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(
            f"its values are {'floating-point' if mode == 'F' else '32-bit'} numbers, whose range is not known: "
            "convert it to 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's; None in a version without it, since it is deprecated from 0.29 on."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
    return lambda encoded: cast(
        Tensor, decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    )


def _resized(image: Tensor, shorter: int) -> Tensor:
    """`image` (C, H, W) with a shorter side of `shorter` pixels."""
    from torchvision.transforms.v2.functional import resize

    return resize(image, [shorter])


def _centre(image: Tensor, size: int) -> Tensor:
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]
