"""What is done to the samples of a split when they are fetched: augmentation, and transforms of extensions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from syncbn.data.augment import Augment
from syncbn.data.chance import seed_generators, seed_of
from syncbn.errors import DataError, SyncbnError
from syncbn.registry import TRANSFORMS
from syncbn.structure import as_tensors, stacked

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A registered transform with its options.

    Args:
        name: as the config has it.
        function: `(input) -> input`, or `(input, target) -> (input, target)`.
        joint: whether it is the latter.
    """

    name: str
    function: Callable[..., Any]
    joint: bool

    def __call__(self, x: Tensor, target: Any) -> tuple[Tensor, Any]:
        """The sample, transformed.

        Raises:
            TypeError: what it returns is not what it is registered for.
        """
        if not self.joint:
            return self._input(self.function(x)), target
        pair = self.function(x, target)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"it returned a {type(pair).__name__}: (input, target) is needed")
        return self._input(pair[0]), pair[1]

    def _input(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"it returned a {type(x).__name__} as input: a tensor is needed")
        return x.as_subclass(Tensor)


def chosen(transforms: Mapping[str, Any], is_test: bool) -> tuple[Transform, ...]:
    """The transforms of a config's `data.transforms` for one split, in their order.

    Raises:
        UsageError: an option that is unknown or of the wrong type.
    """
    entries = [(TRANSFORMS[name], given) for name, given in transforms.items()]
    return tuple(
        Transform(entry.name, partial(entry.build, **entry.typed(given or {})), entry.num_taken > 1)
        for entry, given in entries
        if entry.on_test or not is_test
    )


@dataclass(frozen=True)
class Treatment:
    """What is done to the samples of one split.

    Args:
        seed: the run's seed.
        augment: how images are cropped and flipped, if they are.
        transforms: in their order, after augmentation.
        by_step: whether a sample is another one at each step. Samples that are evaluated are not, because the number
            of ranks decides in which batch they come.
        shapes: of the input and the target of the first sample, which all others must have too, where both are tensors.
        collate: makes a batch of samples; None stacks them.
    """

    seed: int = 0
    augment: Augment | None = None
    transforms: tuple[Transform, ...] = ()
    by_step: bool = True
    shapes: tuple[Shape, Shape] | None = None
    collate: Callable[[list[tuple[Tensor, Any]]], tuple[Any, Any]] | None = None

    def __bool__(self) -> bool:
        """Whether anything is done to them."""
        return self.augment is not None or bool(self.transforms) or self.collate is not None

    def seed_for(self, step: int, index: int) -> None:
        """Seed the global generators for the sample `index` at `step`; see `isolated`."""
        seed_generators(seed_of(self.seed, step if self.by_step else 0, index))

    def transformed(self, x: Tensor, target: Any, name: str) -> tuple[Tensor, Any]:
        """A sample, called `name` in errors, after all transforms.

        Raises:
            DataError: a transform fails, or does not return what it must.
        """
        for transform in self.transforms:
            try:
                x, target = transform(x, target)
            except SyncbnError:
                raise
            except Exception as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                raise DataError(f"transform {transform.name} failed on {name}: {why}") from error
        return x, target

    def all_transformed(
        self, samples: Iterable[tuple[int, Tensor, Any]], step: int, name: Callable[[int], str]
    ) -> list[tuple[Tensor, Any]]:
        """Each of `samples` (index, input, target) transformed, with random numbers of its own; see `isolated`."""
        treated = []
        for index, x, target in samples:
            self.seed_for(step, index)
            treated.append(self.transformed(x, target, name(index)))
        return treated

    def stacked(
        self, samples: list[tuple[Tensor, Any]], indices: Tensor, name: Callable[[int], str]
    ) -> tuple[Tensor, Any]:
        """Inputs (n, *) and targets (n, *) of n > 0 samples; targets may be dicts and tuples of tensors.

        Raises:
            DataError: they are not all of one shape.
        """
        inputs = [x for x, _ in samples]
        targets = [as_tensors(target) for _, target in samples]
        if not all(isinstance(target, Tensor) for target in targets):
            return _stacked(inputs, targets, indices, name)
        shape, target_shape = self.shapes or (inputs[0].shape, targets[0].shape)
        for index, x, target in zip(indices.tolist(), inputs, targets, strict=True):
            if x.shape != shape or target.shape != target_shape:
                raise DataError(
                    f"{name(index)} has an input of shape {tuple(x.shape)} and a target of shape "
                    f"{tuple(target.shape)}, sample 0 {tuple(shape)} and {tuple(target_shape)}: make them equal"
                )
        return torch.stack(inputs), torch.stack(targets)


def _stacked(
    inputs: list[Tensor], targets: list[Any], indices: Tensor, name: Callable[[int], str]
) -> tuple[Tensor, Any]:
    try:
        return torch.stack(inputs), stacked(targets)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{name(int(indices[0]))} and those of its batch have targets that cannot be stacked: make them alike, or "
            f"give the task a collate ({why})"
        ) from error
