"""Settings as Hydra's grammar reads them: which of them give several values, and the grid that these make.

The grammar alone is Hydra's (`key=a,b`, `choice()`, `range()`, `glob()`, casts, `sort()`, `shuffle()`). The points of a
grid are composed and checked by `syncbn.compose`, and run by `syncbn.launch`.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from syncbn.errors import UsageError

MOST_TRIALS = 1000
"""Of one sweep; more is a mistake in the grid far more often than a wish."""

_SHARED = ("name", "runs_dir", "extensions", "task", "task.name")
_SHARED_GROUPS = ("study", "debug", "tracking", "launcher")
"""Keys, and groups with all their keys, that the trials of a sweep have in common; but their ranks may differ."""
_SHARED_WHY = {
    "study": "; `syncbn studies` runs several studies",
    "task": ", by whose measure they are sorted",
    "name": ", and each has a folder of its own within it",
}

_OF_HYDRA = {
    "run": "name= and runs_dir= say where files go",
    "sweep": "name= and runs_dir= say where files go",
    "launcher": "launcher=local and launcher=ray say where ranks come from",
    "sweeper": "`syncbn sweep` runs every combination of key=a,b settings",
    "job": "name= names a run, and its files go to runs_dir/name",
    "searchpath": "conf/ of the current folder is looked into first, and SYNCBN_CONF takes the place of ours",
}
"""What stands in the place of Hydra's own settings, by the part after `hydra`."""


@dataclass(frozen=True)
class Value:
    """One value of a swept key."""

    text: str
    """As an override has it."""
    plain: Any
    """As a config has it."""


Point = Mapping[str, Value]
"""Swept key to its value in one trial."""


@dataclass(frozen=True)
class Grid:
    """What a sweep runs: settings of all trials, and the keys that differ with their values."""

    fixed: tuple[str, ...]
    axes: Mapping[str, tuple[Value, ...]]

    def points(self) -> Iterator[Point]:
        """Every combination; the last key changes fastest."""
        keys = list(self.axes)
        return (
            dict(zip(keys, cell, strict=True)) for cell in itertools.product(*self.axes.values())
        )


def grid_of(overrides: Sequence[str], options_of: Callable[[str], Sequence[str]]) -> Grid:
    """The grid that `overrides` make.

    Args:
        overrides: settings, of which those with several values are swept.
        options_of: the options of a config group by its name, none of what is no group.

    Raises:
        UsageError: what cannot be read, is swept twice or may not be swept, and a grid of no trial, of one, or of more
            than `MOST_TRIALS`.
    """
    parsed = [parse(override) for override in overrides]
    swept = [override for override in parsed if override.is_sweep_override()]
    for override in swept:
        _refuse_unsweepable(override, parsed)
    axes = {o.key_or_group: tuple(_values(o, options_of(o.key_or_group))) for o in swept}
    _refuse_size({key: len(values) for key, values in axes.items()})
    return Grid(tuple(o for o, p in zip(overrides, parsed, strict=True) if p not in swept), axes)


def parse(override: str) -> Override:
    """`override` as Hydra's grammar has it.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return OverridesParser.create().parse_override(with_quoted_home(override))
    except (HydraException, ValueError, TypeError) as error:
        causes = (str(one).partition("\n")[0] for one in (error.__cause__, error))
        reason = next((c for c in causes if c not in ("", "None")), "it ends early")
        reason = reason.partition(" expecting")[0]
        raise UsageError(
            f"{override!r} cannot be read ({reason}): give key=value, a list as [1,2], and a text with commas or "
            "brackets in quotes"
        ) from error


def with_quoted_home(override: str) -> str:
    """`override` as Hydra's grammar can read it, which allows a path to begin with `~` in quotes alone."""
    return re.sub(r"^([^=]+=)(~[\w./ +@%-]*)$", r"\1'\2'", override)


def with_changed_values(override: str, change: Callable[[str], str]) -> str:
    """`override` with `change` made to its value, or to each of those that it gives; quoted where the grammar asks."""
    key, parsed = override.partition("=")[0], parse(override)
    if not parsed.is_sweep_override():
        return f"{key}={_quoted(change(str(parsed.value())))}"
    values = [change(str(value.plain)) for value in _values(parsed, ())]
    return f"{key}={','.join(map(_quoted, values))}"


def _quoted(text: str) -> str:
    if re.fullmatch(r"[\w./:+@%-]+", text) or text.startswith("${"):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def refuse_several(overrides: Sequence[str]) -> None:
    """Raise `UsageError` for the first of `overrides` that cannot be read, or gives several values to one run."""
    for override in overrides:
        if parse(override).is_sweep_override():
            raise UsageError(
                f"{override!r} gives several values, and one run takes one: `syncbn sweep` runs a trial for each; a "
                "list is [1,2], a text with commas stands in quotes"
            )


def explain_hydra(override: str) -> str:
    """What to give in place of a setting of Hydra's own, such as `hydra.run.dir=x`."""
    parts = override.lstrip("+~").partition("=")[0].replace("/", ".").split(".")
    instead = _OF_HYDRA.get(
        parts[1] if len(parts) > 1 else "", "runs, studies and sweeps are set by syncbn's own keys"
    )
    return f"{override!r} is not allowed, Hydra's own settings are refused: {instead}"


def _refuse_unsweepable(override: Override, parsed: Sequence[Override]) -> None:
    """Raise `UsageError` where a key cannot have several values, or is given twice."""
    key, said = override.key_or_group, override.input_line
    group = key.partition(".")[0]
    if key in _SHARED or (group in _SHARED_GROUPS and key != "launcher.num_workers"):
        raise UsageError(
            f"{said!r} is not allowed: all trials of a sweep have one {key}{_SHARED_WHY.get(group, '')}"
        )
    if sum(other.key_or_group == key for other in parsed) > 1:
        raise UsageError(f"{key} is given twice, once with several values: give it once")
    if isinstance(override.value(), IntervalSweep):
        raise UsageError(
            f"{said!r} has no end of values: give some, as {key}=choice(0.1,0.3) or {key}=range(0,3)"
        )


def _values(override: Override, options: Sequence[str]) -> Iterator[Value]:
    """The values of a swept key in order."""
    key = override.key_or_group
    for text in _texts(override, options):
        plain = parse(f"{key}={text}").value()
        yield Value(text, plain)


def _texts(override: Override, options: Sequence[str]) -> list[str]:
    """The values of `override` as settings have them.

    Raises:
        UsageError: a range without an end or of nothing, a glob of what is no group, or that fits none of its options.
    """
    said, value = override.input_line, override.value()
    if isinstance(value, RangeSweep):
        _refuse_range(str(said), value)
    if isinstance(value, Glob):
        found = value.filter(list(options))
        if not found:
            raise UsageError(
                f"{said!r} fits no option of the group {override.key_or_group}: one of {', '.join(options)}"
                if options
                else f"{said!r} is not allowed: glob() chooses among the options of a group, as model=glob(*)"
            )
        return found
    return list(override.sweep_string_iterator())


def _refuse_range(said: str, span: RangeSweep) -> None:
    """Raise `UsageError` where a range has no value or very many; it is not made for that."""
    start, stop, step = (float(x or 0) for x in (span.start, span.stop, span.step))
    if step == 0 or (stop - start) / step <= 0:
        raise UsageError(
            f"{said!r} has no value: range(start,stop) or range(start,stop,step), the stop left out"
        )
    if (stop - start) / step > MOST_TRIALS:
        raise UsageError(
            f"{said!r} has more than {MOST_TRIALS} values, the most that a sweep may run"
        )


def _refuse_size(sizes: Mapping[str, int]) -> None:
    """Raise `UsageError` for a grid that is none, or too large."""
    number = 1
    for size in sizes.values():
        number *= size
    if number == 1:
        raise UsageError(
            "a sweep of one trial: give some key several values, as optim.lr=0.01,0.1 or seed='range(0,3)'; "
            "`syncbn train` runs one"
        )
    if number > MOST_TRIALS:
        product = " x ".join(f"{size} of {key}" for key, size in sizes.items())
        raise UsageError(f"{product} make {number} trials: at most {MOST_TRIALS} in one sweep")
