"""Random crops and flips of training images.

Every sample draws from its own generator, seeded by (seed, step, sample index). What a sample looks like in a step then
depends neither on the rank that fetches it, nor on loader processes, nor on where a run was resumed. It costs about 20
us a sample.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Augment:
    """How training images are varied.

    Args:
        seed: the run's seed.
        flip: mirror every second image, left to right.
    """

    seed: int
    flip: bool

    def view(self, image: Tensor, height: int, width: int, step: int, index: int) -> Tensor:
        """A crop (C, height, width) of a larger `image` (C, H, W), at a random place, flipped or not."""
        rng = np.random.default_rng((self.seed, step, index))
        top = int(rng.integers(image.shape[1] - height + 1))
        left = int(rng.integers(image.shape[2] - width + 1))
        crop = image[:, top : top + height, left : left + width]
        return crop.flip(-1) if self.flip and rng.random() < 0.5 else crop

    def batch(self, images: Tensor, step: int, indices: Tensor) -> Tensor:
        """Each of raw `images` (n, C, H, W) shifted by up to an eighth of its size, black beyond its edge.

        For 32 pixels that is He et al. (2016)'s padding by 4.
        """
        height, width = images.shape[2:]
        shift_y, shift_x = -(-height // 8), -(-width // 8)
        larger = pad(images, (shift_x, shift_x, shift_y, shift_y))
        numbered = zip(larger, indices.tolist(), strict=True)
        return torch.stack([self.view(one, height, width, step, i) for one, i in numbered])
