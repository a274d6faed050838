"""Every key of the schema says what it means, and docs/settings.md has them all."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from syncbn.cli.settings import settings as verb
from syncbn.config.settings import as_page, settings
from syncbn.errors import UsageError
from syncbn.keys import known_keys

pytestmark = pytest.mark.untraced
PAGE = Path(__file__).parents[2] / "docs/settings.md"


def test_every_key_has_a_meaning() -> None:
    assert [setting.key for setting in settings() if not setting.meaning] == []


def test_every_key_that_can_be_given_is_there() -> None:
    found = {setting.key for setting in settings()}
    groups = {key.split(".")[0] for key in known_keys() if "." in key}
    assert {key for key in known_keys() if key not in {*groups, "study"}} <= found


def test_the_page_is_what_make_settings_writes() -> None:
    assert PAGE.read_text() == as_page(), "run `make settings`"


def test_types_and_defaults_are_written_as_on_a_command_line() -> None:
    found = {setting.key: setting for setting in settings()}
    assert (found["optim.lr"].type, found["optim.lr"].default) == ("number", "0.05")
    assert (found["train.ema"].type, found["train.ema"].default) == ("number", "null")
    assert found["model.hidden"].type == "list of whole number"
    assert found["model.hidden"].default == "[100, 100]"
    assert found["optim.groups.*.lr_scale"].default == "1"
    assert found["study.claims[].name"].default == "needed"
    assert found["train.drop_last"].default == "true"


def test_words_choose_among_them() -> None:
    shown = CliRunner().invoke(verb, ["moving", "average"])
    assert "train.ema=null" in shown.output
    assert "optim.lr" not in shown.output
    with pytest.raises(UsageError, match="no setting has frobnicate"):
        CliRunner().invoke(verb, ["frobnicate"], catch_exceptions=False)


def test_the_page_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    CliRunner().invoke(verb, ["--page", str(tmp_path / "page.md")], catch_exceptions=False)
    assert (tmp_path / "page.md").read_text() == as_page()
