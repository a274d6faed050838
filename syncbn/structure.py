"""Batches that are more than a tensor: dicts, lists and tuples of tensors, nested.

In a batch a tensor has the samples as its first dimension, whether it stands alone or in a dict or a tuple, and a list
holds an item a sample, whatever that is. So boxes of varying number are a list, and a mask beside a class is a dict.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`batch` with every tensor changed; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return _like(batch, [mapped(value, change) for value in batch])
    return batch


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """`batch` on `device`, with its floating tensors of `dtype`, where one is given."""

    def move(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        return tensor.to(device, wanted, non_blocking=True)

    return mapped(batch, move)


def doubled(batch: Any) -> Any:
    """`batch` with its floating tensors in float64."""
    return mapped(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def count(batch: Any) -> int:
    """Samples in a batch.

    Raises:
        TypeError: it holds neither a tensor nor a list.
    """
    if isinstance(batch, Tensor | list):
        return len(batch)
    parts = batch.values() if isinstance(batch, dict) else batch
    if not isinstance(batch, dict | tuple) or not parts:
        raise TypeError(f"a {type(batch).__name__} is no batch of tensors")
    return count(next(iter(parts)))


def part(batch: Any, first: int, last: int) -> Any:
    """The samples of `batch` from `first` to below `last`."""
    if isinstance(batch, Tensor | list):
        return batch[first:last]
    if isinstance(batch, dict):
        return {key: part(value, first, last) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return _like(batch, [part(value, first, last) for value in batch])
    return batch


def cut(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """`batch` in consecutive parts of `sizes` samples."""
    if isinstance(batch, Tensor):
        return list(batch.split(list(sizes)))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [part(batch, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def stacked(samples: Sequence[Any]) -> Any:
    """A batch of samples that are alike: tensors of one shape, or the same dicts or tuples of such.

    Raises:
        TypeError, ValueError, KeyError, RuntimeError: they are not.
    """
    first = samples[0]
    if isinstance(first, dict):
        return {key: stacked([sample[key] for sample in samples]) for key in first}
    if isinstance(first, list | tuple):
        return tuple(stacked(row) for row in zip(*samples, strict=True))
    return torch.stack([torch.as_tensor(sample) for sample in samples])


def as_tensors(target: Any) -> Any:
    """A sample's target as tensors: a dict, or a list or tuple with tensors or dicts in it, keeps its structure."""
    if isinstance(target, dict):
        return {key: as_tensors(value) for key, value in target.items()}
    if isinstance(target, list | tuple) and any(isinstance(v, Tensor | dict) for v in target):
        return _like(target, [as_tensors(value) for value in target])
    return torch.as_tensor(target)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor of `batch`; a list without any samples counts as one of no elements."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_of(value)


def _like(given: Any, values: list[Any]) -> Any:
    """`values` as the list, tuple or named tuple that `given` is."""
    return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)
