"""An epoch of small JPEGs from folders: `data=image_folder` against torchvision's ImageFolder in a DataLoader.

    python -m benchmarks.image_folder [--images 20000] [--loaders 0 2] [--budget 60]    # prints images a second

Both decode, resize the shorter side, crop the centre, convert to float and standardise, in batches of the same samples
in the same order, with the same number of loader processes; they take turns by epochs. Images are written to a
temporary folder first.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.clock import interleaved, say, words
from benchmarks.contenders import Run
from syncbn.config import DataConfig
from syncbn.data import load_data
from syncbn.data.folder import IMAGENET_MEAN, IMAGENET_STD

SIZE = 32
"""Height and width of a prepared image; its shorter side is 37 before the crop."""
BATCH = 64
CLASSES = 10


def write_images(root: Path, num_images: int) -> None:
    """Write JPEGs of 48 to 95 pixels a side: `num_images` to train on, one a class to test on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", num_images), ("test", CLASSES)):
        for index in range(count):
            folder = root / part / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            _write_image(folder / f"{index}.jpg", rng)


def _write_image(file: Path, rng: np.random.Generator) -> None:
    from PIL import Image

    height, width = (int(side) for side in rng.integers(48, 96, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=85)


def measure(
    root: Path, loaders: Sequence[int], budget_s: float, batch: int = BATCH
) -> list[dict[str, Any]]:
    """A row for each number of loader processes: median milliseconds of an epoch of each, images a second, the ratio.

    Args:
        root: what `write_images` wrote.
        loaders: numbers of loader processes; 0 is none.
        budget_s: seconds to spend on each.
        batch: images a batch.
    """
    torch.set_num_threads(1)
    return [_row(root, num_loaders, budget_s, batch) for num_loaders in loaders]


def _row(root: Path, num_loaders: int, budget_s: float, batch: int) -> dict[str, Any]:
    runs = {
        "syncbn": _ours(root, num_loaders, batch),
        "torchvision": _torchvisions(root, num_loaders, batch),
    }
    timed = interleaved(runs, budget_s)
    ours, theirs = (timed["ms"][name] for name in runs)
    num_images = len(_plan(root, batch)) * batch
    row = {
        "loaders": num_loaders,
        "images": num_images,
        "images_per_s": {name: round(1000 * num_images / timed["ms"][name]) for name in runs},
        "times_as_fast": round(theirs / ours, 2),
        **timed,
    }
    say(
        f"{num_loaders} loaders {words(row)}: {row['images_per_s']}, {row['times_as_fast']} times as fast"
    )
    return row


def _ours(root: Path, num_loaders: int, batch: int) -> Run:
    cfg = DataConfig(name="image_folder", root=str(root), image_size=SIZE, num_loaders=num_loaders)
    split, plan = load_data(cfg, seed=0).train, _plan(root, batch)
    return lambda: sum(len(x) for x, _ in split.batches(iter(plan)))


def _torchvisions(root: Path, num_loaders: int, batch: int) -> Run:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    prepare = transforms.Compose(
        [
            transforms.Resize(-(-SIZE * 8 // 7)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    images = ImageFolder(root / "train", prepare)
    plan = [indices.tolist() for indices in _plan(root, batch)]
    loader = DataLoader(images, batch_sampler=plan, num_workers=num_loaders)
    return lambda: sum(len(x) for x, _ in loader)


def _plan(root: Path, batch: int) -> list[torch.Tensor]:
    """The samples of each batch: all, shuffled, without a last, smaller batch."""
    num_images = sum(1 for _ in (root / "train").glob("*/*.jpg"))
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_images))
    return [indices for indices in order.split(batch) if len(indices) == batch]


def main() -> None:
    """Parse the command line, write images, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_folder", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--loaders", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each of --loaders")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        measure(Path(folder), options.loaders, options.budget)


if __name__ == "__main__":
    main()
