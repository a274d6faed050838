"""Every key of the schema with its type, default and meaning: the dataclasses, and the strings under their fields."""

import ast
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from syncbn.config.run import RunConfig
from syncbn.config.study import Config


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
        key: dotted, as on a command line; `*` stands for a name of the user's own, `[]` for one of a list.
        type: in words, such as `whole number` or `list of text`.
        default: as YAML has it.
        meaning: one paragraph of Markdown.
    """

    key: str
    type: str
    default: str
    meaning: str


_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "any value",
}


def settings(schema: type = Config, prefix: str = "") -> Iterator[Setting]:
    """The keys of `schema` in the order of its fields, those of a group after one another."""
    hints, meanings = get_type_hints(schema), _meanings(schema)
    for field in fields(schema):
        key, hint = prefix + field.name, _without_none(hints[field.name])
        inner, place = _inner(hint)
        if inner is None or place:
            yield Setting(key, _in_words(hint), _default(field), meanings.get(field.name, ""))
        if inner is not None:
            yield from settings(inner, f"{key}{place}.")


def as_page() -> str:
    """All settings as a page in Markdown, a table a group."""
    parts: dict[str, list[Setting]] = {"": []}
    for setting in settings():
        group = setting.key.partition(".")[0] if "." in setting.key else ""
        parts.setdefault(group, []).append(setting)
    return _PAGE_HEAD + "\n".join(_section(group, found) for group, found in parts.items())


_PAGE_HEAD = """# Settings

Every key of a run and of a study, as given on a command line (`train.steps=100`) or in a project's `conf/config.yaml`.
`syncbn settings WORD` shows those that a word fits. A group (`model=resnet18`) sets several keys at once: its file in
`conf/` says which. Here `*` stands for a name of your own, `[]` for each of a list. `make settings` writes this page.

"""


def _section(group: str, found: list[Setting]) -> str:
    rows = [f"| `{s.key}` | {s.type} | `{s.default}` | {_in_cell(s.meaning)} |" for s in found]
    head = f"## {group or 'The run'}\n\n{_about(group)}\n"
    return "\n".join([head, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _in_cell(meaning: str) -> str:
    return meaning.replace("|", "\\|")


def _about(group: str) -> str:
    """The first paragraph of what the dataclass of a group says of itself."""
    inner = _inner(_without_none(get_type_hints(Config)[group]))[0] if group else RunConfig
    return " ".join((inspect.getdoc(inner or Config) or "").split("\n\n")[0].split())


@cache
def _meanings(schema: type) -> Mapping[str, str]:
    """The string under each field, of `schema` and of what it derives from."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in schema.__mro__ if is_dataclass(c)]):
        body = ast.parse(inspect.getsource(owner)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = _text(below)
    return found


def _text(statement: ast.stmt) -> str:
    """The string that `statement` is, on one line; "" where it is something else."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        return ""
    return " ".join(value.value.split())


def _inner(hint: Any) -> tuple[type | None, str]:
    """The dataclass that `hint` holds, and how a key reaches into it: as a part, one of a list, or by name."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint, ""
    held = get_args(hint)[-1] if get_origin(hint) in (list, dict) else None
    if is_dataclass(held) and isinstance(held, type):
        return held, "[]" if get_origin(hint) is list else ".*"
    return None, ""


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _in_words(hint: Any) -> str:
    if get_origin(hint) is list:
        return f"list of {_in_words(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"{_in_words(get_args(hint)[1])} by name"
    return _WORDS.get(hint, "settings")


def _default(field: "Field[Any]") -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return _yaml(value)


def _yaml(value: Any) -> str:
    """`value` as one would write it on a command line."""
    if value is MISSING:
        return "needed"
    if value is None or value == "":
        return "null" if value is None else "''"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_yaml(one) for one in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
