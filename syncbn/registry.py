"""What a config chooses by name: models, data sets, transforms, tasks, optimisers, each with the options that it takes.

A name is registered with the function that builds what it stands for. The function's keyword-only parameters are its
options: their annotations are the types that a config is checked against, their defaults the values where it says
nothing. A config names nothing else: no class, no function, no file.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from syncbn.errors import UsageError

_WHOLE = "cfg"
TRANSFORM, CALLBACK = "transform", "callback"
_SEVERAL = {TRANSFORM: "data.transforms", CALLBACK: "callbacks"}
"""The groups of which a config chooses several at once, and the key under which it does."""

Build = TypeVar("Build", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        group: the config group that chooses it, such as `model`.
        name: in that group.
        build: makes what it stands for.
        options: a dataclass of the options of `build`, with their types and defaults.
        num_taken: parameters of `build` before its options.
        on_test: of a transform, whether test samples go through it too.
    """

    group: str
    name: str
    build: Callable[..., Any]
    options: type
    num_taken: int = 0
    on_test: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option with its default, `???` where it has none."""
        tree = OmegaConf.to_container(OmegaConf.structured(self.options))
        assert isinstance(tree, dict)
        return {str(key): value for key, value in tree.items()}

    def keywords(self, cfg: Any) -> dict[str, Any]:
        """The options of `build`, typed: those of the group's `cfg` over the defaults.

        What the package itself registers may take `cfg` whole, as an option of that name.

        Raises:
            UsageError: an unknown option (with the nearest known one), one of the wrong type, or one that is missing.
        """
        if not cfg.options and _WHOLE in self._known():
            return {_WHOLE: cfg}
        return self.typed(cfg.options)

    def typed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` over the defaults, typed; raises as `keywords` does."""
        given = dict(options)
        try:
            tree = OmegaConf.merge(OmegaConf.structured(self.options), given)
            typed = OmegaConf.to_object(tree)
        except ConfigKeyError as error:
            raise UsageError(self._unknown(given)) from error
        except MissingMandatoryValue as error:
            raise UsageError(f"{self._chosen} needs {self._key}.{error.key}") from error
        except ValidationError as error:
            raise UsageError(self._ill_typed(error, given)) from error
        return {field.name: getattr(typed, field.name) for field in fields(self.options)}

    @property
    def _key(self) -> str:
        """Where a config has its options."""
        several = _SEVERAL.get(self.group)
        return f"{several}.{self.name}" if several else f"{self.group}.options"

    @property
    def _chosen(self) -> str:
        """How it is called in errors."""
        several = self.group in _SEVERAL
        return f"{self.group} {self.name}" if several else f"{self.group}={self.name}"

    def _known(self) -> list[str]:
        return [field.name for field in fields(self.options)]

    def _unknown(self, given: Mapping[str, Any]) -> str:
        known = [name for name in self._known() if name != _WHOLE]
        wrong = next(key for key in given if key not in known)
        near = difflib.get_close_matches(wrong, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f": one of {', '.join(known) or 'none'}"
        return f"{self._key}.{wrong} is not an option of {self._chosen}{hint}"

    def _ill_typed(self, error: OmegaConfBaseException, given: Mapping[str, Any]) -> str:
        option = str(error.full_key or error.key).partition("[")[0]
        annotation = {field.name: field.type for field in fields(self.options)}.get(option)
        allowed = getattr(annotation, "__name__", str(annotation))
        return f"{self._key}.{option}={given.get(option)!r} is not allowed: of type {allowed}"


class Registry:
    """The names of one config group.

    Args:
        group: of the config.
        takes: the names of the parameters that `build` is called with, before its options.
        built_in: names that the package itself registers, known before its modules are imported.
        may_take: the name of a parameter after those, which `build` may have.
    """

    def __init__(
        self, group: str, takes: Sequence[str], built_in: Sequence[str], may_take: str | None = None
    ) -> None:
        self.group, self.takes, self.built_in = group, tuple(takes), tuple(built_in)
        self.may_take = may_take
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, on_test: bool = False) -> Callable[[Build], Build]:
        """A decorator for the function or class that builds what `name` stands for; see `Entry` for `on_test`.

        Raises:
            UsageError: a name that is no plain word or is taken, parameters other than `takes` and options by keyword,
                or an option without a type that a config can have.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(
                f"{self.group} name {name!r} is not allowed: one word of letters, digits and '_', as text"
            )

        def decorate(build: Build) -> Build:
            self._refuse_taken(name, build)
            taken, options = self._parameters_of(name, build)
            self._entries[name] = Entry(self.group, name, build, options, len(taken), on_test)
            return build

        return decorate

    def names(self) -> list[str]:
        """All names: those of the package first, then those of extensions in the order of their registration."""
        return [*self.built_in, *(entry.name for entry in self.extensions())]

    def extensions(self) -> list[Entry]:
        """What was registered from outside the package."""
        return [entry for name, entry in self._entries.items() if name not in self.built_in]

    def find(self, name: str) -> Entry | None:
        """The entry of `name`; None where none is registered."""
        return self._entries.get(name)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def _refuse_taken(self, name: str, build: Callable[..., Any]) -> None:
        inside = getattr(build, "__module__", "").startswith("syncbn.")
        if name in self.built_in and not inside:
            raise UsageError(
                f"{self.group} name {name!r} is taken: syncbn has a {self.group} of its own by that name"
            )
        taken = self._entries.get(name)
        if taken is not None and _place(taken.build) != _place(build):
            raise UsageError(
                f"{self.group} name {name!r} is taken: {_place(taken.build)} has registered it"
            )

    def _parameters_of(self, name: str, build: Callable[..., Any]) -> tuple[list[str], type]:
        """What `build` takes before its options, and these as a dataclass."""
        what = f"{self.group} {name!r} ({_place(build)})"
        parameters = list(inspect.signature(build).parameters.values())
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        taken = [p.name for p in parameters if p not in options]
        allowed = [self.takes, (*self.takes, self.may_take)] if self.may_take else [self.takes]
        if len(taken) not in map(len, allowed):
            wanted = " or ".join(
                f"({', '.join((*names, '*', 'option: type = default'))})" for names in allowed
            )
            raise UsageError(f"{what} must be callable as {wanted}, it takes ({', '.join(taken)})")
        hints = get_type_hints(build.__init__ if inspect.isclass(build) else build)
        rows = [(p.name, hints.get(p.name, Any), _default(p)) for p in options]
        made = make_dataclass(f"{name}_options", rows)
        try:
            OmegaConf.structured(made)
        except (OmegaConfBaseException, ValueError) as error:
            raise UsageError(
                f"{what} has an option of a type that no config can hold: {str(error).splitlines()[0]}"
            ) from error
        return taken, made


def _default(parameter: inspect.Parameter) -> Any:
    from dataclasses import field

    if parameter.default is parameter.empty:
        return MISSING
    if isinstance(parameter.default, list | dict | set):
        return field(default_factory=lambda: type(parameter.default)(parameter.default))
    return parameter.default


def _place(build: Callable[..., Any]) -> str:
    return f"{getattr(build, '__module__', '?')}.{getattr(build, '__qualname__', build)}"


MODELS = Registry("model", ("shape", "num_classes"), ("mlp", "cnn", "vgg", "torchvision", "timm"))
"""Build an `nn.Module` for inputs `(N, *shape)` with outputs `(N, num_classes)`."""
DATA = Registry(
    "data",
    ("root", "split"),
    ("digits", "mnist", "fashion_mnist", "cifar10", "image_folder", "synthetic"),
)
"""Build a map-style Dataset of (input, target) pairs for a split, `train` or `test`."""
TRANSFORMS = Registry(TRANSFORM, ("input",), (), may_take="target")
"""Are applied to a sample: its input alone, or (input, target) as a pair."""
CALLBACKS = Registry(CALLBACK, (), ())
"""Build a `syncbn.callbacks.Callback`."""
TASKS = Registry("task", (), ("classification", "regression"))
"""Build a `syncbn.tasks.Task`."""
OPTIMIZERS = Registry("optim", ("groups", "lr"), ("sgd", "adam", "adamw"))
"""Build a `torch.optim.Optimizer` over parameter groups."""

REGISTRIES = {registry.group: registry for registry in (MODELS, DATA, TASKS, OPTIMIZERS)}
"""By config group."""
