"""Mutants: errors planted in the package one at a time, what each aims at, and how it gets there.

A mutant of Python code aims at a function by its dotted name (`Replaced`). Every process of the test plants it by
itself, when it has executed the module that defines the function and before anything else has imported from it; see
`startup/sitecustomize.py`. Where what breaks lies inside of a function, in native or Triton code or in one line of a
longer one, a fragment of that function's source is edited in a copy of the package (`Edited`).

An aim that misses, because a name does not exist or a fragment does not stand in its function exactly once, is a
`MissedAim`.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[3]


class MissedAim(LookupError):
    """What a mutant aims at does not exist, or not exactly once."""


@dataclass(frozen=True)
class Mutant:
    """An error, and the test that must fail with it.

    Attributes:
        what: the error, in words that no other mutant has.
        test: as pytest takes it, from the root of the repository.
        kernels: as in `SYNCBN_KERNELS`; "" leaves the choice to the layer.
        exchange: as in `SYNCBN_EXCHANGE`, likewise.
    """

    what: str
    test: str
    kernels: str = ""
    exchange: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the test needs."""
        settings = {"SYNCBN_KERNELS": self.kernels, "SYNCBN_EXCHANGE": self.exchange}
        return {name: value for name, value in settings.items() if value}


@dataclass(frozen=True, kw_only=True)
class Replaced(Mutant):
    """A mutant that puts something else in the place of what has a name.

    Attributes:
        aim: dotted name of a function, method, property or constant, such as `syncbn.norm.moments.merge`.
        by: given the original (of a property its getter), returns what takes its place.
    """

    aim: str
    by: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Edited(Mutant):
    """A mutant that changes a fragment of one function's source.

    Attributes:
        file: from the root of the repository; Python or C++.
        function: its name, of a method of Python behind the name of its class.
        before: the fragment; stands exactly once in the functions of this name.
        after: what takes its place.
    """

    file: str
    function: str
    before: str
    after: str

    @property
    def is_native(self) -> bool:
        """Whether the native library must be built again."""
        return not self.file.endswith(".py")


def split(aim: str) -> tuple[str, str]:
    """The module of a dotted name, and the name inside of it.

    Raises:
        MissedAim: there is no such module.
    """
    parts = aim.split(".")
    for end in range(len(parts) - 1, 0, -1):
        place = ROOT.joinpath(*parts[:end])
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists():
            return ".".join(parts[:end]), ".".join(parts[end:])
    raise MissedAim(f"no module of {aim}")


def replace(module: ModuleType, name: str, by: Callable[[Any], Any]) -> None:
    """Put what `by` makes of the original in the place of `name`, which may be `Class.method`, of `module`.

    Raises:
        MissedAim: the module or class itself does not define the name.
    """
    *outer, last = name.split(".")
    try:
        owner = functools.reduce(getattr, outer, module)
        original = vars(owner)[last]
    except (AttributeError, KeyError) as error:
        raise MissedAim(f"{module.__name__} has no {name}") from error
    setattr(owner, last, _replacement(original, by))


def _replacement(original: Any, by: Callable[[Any], Any]) -> Any:
    if isinstance(original, property):
        return property(by(original.fget))
    if isinstance(original, staticmethod | classmethod):
        return type(original)(by(original.__func__))
    return by(original)


class _Planter(importlib.abc.MetaPathFinder):
    """Finds one module, and replaces a name in it as soon as it is executed."""

    def __init__(self, mutant: Replaced) -> None:
        self._by = mutant.by
        self._module, self._name = split(mutant.aim)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec, with a loader that plants the mutant; None for any other module."""
        if fullname != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def plant(module: ModuleType) -> None:
            execute(module)
            replace(module, self._name, self._by)

        spec.loader.exec_module = plant
        return spec


def plant(mutant: Mutant) -> None:
    """Have this process import the mutant in place of the original; nothing to do for an `Edited` one."""
    if isinstance(mutant, Replaced):
        sys.meta_path.insert(0, _Planter(mutant))


def edited(mutant: Edited, root: Path = ROOT) -> str:
    """The text of the mutant's file with its fragment changed.

    Raises:
        MissedAim: the functions of its name do not have the fragment exactly once.
    """
    text = (root / mutant.file).read_text()
    find = _cpp_functions if mutant.is_native else _python_functions
    spans = list(find(text, mutant.function))
    at = [
        start + match.start()
        for start, end in spans
        for match in re.finditer(re.escape(mutant.before), text[start:end])
    ]
    if len(at) != 1:
        raise MissedAim(
            f"{mutant.file}: {len(spans)} function(s) {mutant.function} have {mutant.before!r} {len(at)} times"
        )
    return text[: at[0]] + mutant.after + text[at[0] + len(mutant.before) :]


def _python_functions(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Where the functions of this name, `Class.method` included, begin and end in `text`."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    *outer, last = name.split(".")
    scopes: list[ast.AST] = [ast.parse(text)]
    for cls in outer:
        scopes = [
            one for s in scopes for one in ast.iter_child_nodes(s) if _is(one, ast.ClassDef, cls)
        ]
    for scope in scopes:
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.FunctionDef) and node.name == last:
                assert node.end_lineno is not None
                yield starts[node.lineno - 1], starts[node.end_lineno]


def _is(node: ast.AST, kind: type[ast.AST], name: str) -> bool:
    return isinstance(node, kind) and getattr(node, "name", None) == name


def _cpp_functions(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Where the bodies of the functions of this name, overloads included, begin and end in `text`."""
    for match in re.finditer(rf"\b{re.escape(name)}\s*(?=\()", text):
        behind = _closing(text, match.end(), "()")
        body = re.compile(r"\s*(const\s*)?(:[^;{]*)?\{").match(text, behind)
        if body:
            yield match.start(), _closing(text, body.end() - 1, "{}")


def _closing(text: str, at: int, pair: str) -> int:
    """The place behind the bracket that closes the one at `at`."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == pair[0]) - (text[place] == pair[1])
        if depth == 0:
            return place + 1
    raise MissedAim("a bracket is not closed")
