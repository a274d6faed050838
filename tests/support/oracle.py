"""The oracle of the layer's tests: torch's own BatchNorm on the concatenated batch, and how to compare with it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if expected.numel() == 0:
        return 0.0
    scale = expected.detach().double().abs().max().clamp(min=1e-300)
    return float((actual.detach().double() - expected.detach().double()).abs().max() / scale)


def assert_close(actual: Tensor, expected: Tensor, bound: float, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= bound, f"{what}: relative error {error:.2e} is over {bound:.0e}"


def own_part(whole: Tensor, sizes: Sequence[int]) -> Tensor:
    """This rank's part of `whole`, split along the batch by `sizes`; a copy in the same memory format."""
    return whole.split(list(sizes))[dist.get_rank()].clone(memory_format=torch.preserve_format)


def batch_norm(channels: int, dims: int = 4, **options: object) -> nn.Module:
    """torch's BatchNorm for an input of `dims` dimensions, with weight and bias that are not 1 and 0."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    layer = kind(channels, **options)
    if layer.affine:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            layer.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
            layer.bias.copy_(torch.randn(channels, generator=generator))
    return layer


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient; random upstream gradients, because a constant one has gradient 0 by nature."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad
