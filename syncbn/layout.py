"""Where data sets lie, and checks on folders and files before anything is parsed.

Each check fails with one line that says what to do. Nothing here imports torch, so that a missing folder is reported
before ranks, Ray or MLflow are started.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from syncbn.config import DataConfig
from syncbn.errors import DataError

PUBLISHED = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
}
"""torchvision's class for a data set that can be fetched, and the folder under data.root that it reads."""
IMAGE_FOLDER = (
    "data=image_folder reads data.root=PATH with PATH/train/<class>/ and PATH/test/<class>/"
)


def remedy(name: str) -> str:
    """How to get the published data set `name`, in words."""
    class_name, folder = PUBLISHED[name]
    return (
        f"set data.root=PATH where PATH/{folder}/ holds {class_name} in torchvision's layout, "
        "or fetch it with data.download=true"
    )


def require_folders(cfg: DataConfig) -> None:
    """Raise `DataError` where the folders that `cfg` reads are not there; looks at no file."""
    root = Path(cfg.root)
    if cfg.name == "image_folder":
        for folder in (root, root / "train", root / "test"):
            check_folder(folder, IMAGE_FOLDER)
    elif cfg.name in PUBLISHED and not cfg.download:
        for folder in (root, root / PUBLISHED[cfg.name][1]):
            check_folder(folder, remedy(cfg.name))


def check_folder(folder: Path, remedy: str) -> None:
    """Raise `DataError`, ending in `remedy`, unless `folder` is a folder that this process may list."""
    if not folder.exists():
        raise DataError(f"folder {folder} is missing: {remedy}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file where a folder is due: {remedy}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"no permission to read folder {folder}: {remedy}")


def check_files(files: Sequence[Path], remedy: str) -> None:
    """Raise `DataError` for the first file that is missing, empty or unreadable; links are followed."""
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing: {remedy}")
        if not os.access(file, os.R_OK):
            raise DataError(f"no permission to read {file}")
        if not file.stat().st_size:
            raise DataError(f"{file} is damaged (0 bytes): remove it, then {remedy}")
