"""From raw pixels to what a model sees, with torchvision's transforms v2."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from syncbn.data.memory import binarized


def preparation(
    binarize: bool, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """What turns uint8 images (..., C, H, W) into float32: binarised, or standardised per channel.

    Args:
        binarize: 1 for pixels above one half, else 0; `mean` and `std` are then not used.
        mean: of each channel, with pixels in [0, 1].
        std: of each channel, with pixels in [0, 1].
    """
    from torchvision.transforms import v2

    in_unit_range = v2.ToDtype(torch.float32, scale=True)
    if binarize:
        return v2.Compose([in_unit_range, binarized])
    # In place on the fresh float32 copy: one copy of MNIST less.
    return v2.Compose([in_unit_range, v2.Normalize(list(mean), list(std), inplace=True)])
