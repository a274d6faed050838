"""What is measured: shapes, layouts and dtypes, with the operands that belong to them.

The shapes are layers of a ResNet-50 at several batch sizes a rank: small ones, where waiting counts, and some
beyond any cache, where memory does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]

SHAPES: tuple[Shape, ...] = (
    (2, 64, 56, 56),
    (8, 64, 56, 56),
    (2, 256, 56, 56),
    (8, 256, 56, 56),
    (8, 128, 28, 28),
    (16, 512, 14, 14),
    (8, 1024, 14, 14),
    (32, 2048, 7, 7),
    (16, 64, 112, 112),
)
LAYOUTS: Mapping[str, torch.memory_format] = {
    "NCHW": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One input: its shape `(N, C, H, W)` on each rank, and names of its layout and dtype."""

    shape: Shape
    layout: str = "NCHW"
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout} {self.dtype}"

    def tensor(self, requires_grad: bool = False) -> Tensor:
        """Random values."""
        made = torch.randn(self.shape).to(DTYPES[self.dtype], memory_format=LAYOUTS[self.layout])
        return made.requires_grad_(requires_grad)

    def row(self) -> dict[str, Any]:
        """The case as part of a result."""
        return {"shape": list(self.shape), "layout": self.layout, "dtype": self.dtype}


def all_cases(
    shapes: tuple[Shape, ...] = SHAPES,
    layouts: tuple[str, ...] = tuple(LAYOUTS),
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> Iterator[Case]:
    """Every shape in every layout and dtype."""
    for dtype in dtypes:
        for layout in layouts:
            yield from (Case(shape, layout, dtype) for shape in shapes)
