"""Registered names: what may register, and what its options are checked against."""

from pathlib import Path

import pytest
from torch import nn

from syncbn.config import ModelConfig
from syncbn.errors import UsageError
from syncbn.registry import Registry


@pytest.fixture
def models() -> Registry:
    return Registry("model", ("shape", "num_classes"), ("mlp",))


SIZES = [1, 2]


def _net(shape, num_classes, *, width: int = 8, sizes: list[int] = SIZES, root: Path | None = None):
    return nn.Identity()


def _given(**options) -> ModelConfig:
    return ModelConfig(name="net", options=options)


def test_keyword_only_parameters_are_options_with_their_defaults(models):
    models.register("net")(_net)
    assert models.names() == ["mlp", "net"]
    assert models["net"].defaults == {"width": 8, "sizes": [1, 2], "root": None}
    assert models["net"].keywords(_given(width="16")) == {
        "width": 16,
        "sizes": [1, 2],
        "root": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wdth": 3}, "model.options.wdth is not an option of model=net; did you mean 'width'?"),
        ({"colour": 3}, "is not an option of model=net: one of width, sizes, root"),
        ({"width": "wide"}, "model.options.width='wide' is not allowed: of type int"),
        ({"sizes": ["a"]}, "model.options.sizes=.'a'. is not allowed"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(models, options, message):
    models.register("net")(_net)
    with pytest.raises(UsageError, match=message):
        models["net"].keywords(_given(**options))


def test_an_option_without_default_is_demanded(models):
    @models.register("net")
    def net(shape, num_classes, *, width: int): ...

    assert models["net"].keywords(_given(width=4)) == {"width": 4}
    with pytest.raises(UsageError, match=r"model=net needs model.options.width"):
        models["net"].keywords(_given())


@pytest.mark.parametrize("name", ["", "two words", "a-b", "3d", None])
def test_a_name_is_one_word(models, name):
    with pytest.raises(UsageError, match="is not allowed: one word"):
        models.register(name)(_net)


def test_a_taken_name_is_refused_and_the_same_function_may_come_again(models):
    models.register("net")(_net)
    models.register("net")(_net)  # its module was imported under another name too

    def other(shape, num_classes): ...

    with pytest.raises(UsageError, match=r"'net' is taken: .*_net has registered it"):
        models.register("net")(other)
    with pytest.raises(UsageError, match="'mlp' is taken: syncbn has a model of its own"):
        models.register("mlp")(other)


def test_other_parameters_than_those_it_is_called_with_are_refused(models):
    def net(num_classes): ...

    with pytest.raises(
        UsageError, match=r"must be callable as \(shape, num_classes, \*, .*takes \(num_classes\)"
    ):
        models.register("net")(net)


def test_an_option_of_a_type_that_no_config_can_hold_is_refused(models):
    def net(shape, num_classes, *, block: nn.Module): ...

    with pytest.raises(UsageError, match="option of a type that no config can hold"):
        models.register("net")(net)


def test_what_the_package_registers_takes_its_group_whole(models):
    def mlp(shape, num_classes, *, cfg: ModelConfig): ...

    mlp.__module__ = "syncbn.models"
    models.register("mlp")(mlp)
    cfg = ModelConfig(width=7)
    assert models["mlp"].keywords(cfg) == {"cfg": cfg}
    with pytest.raises(UsageError, match="is not an option of model=mlp: one of none"):
        models["mlp"].keywords(ModelConfig(options={"width": 3}))
