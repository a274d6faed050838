"""`syncbn settings`: every key of a config, what it means, and its default."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from syncbn.cli.options import as_json

if TYPE_CHECKING:
    from syncbn.config.settings import Setting


@click.command()
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all of them to this file, as Markdown.",
)
@as_json
def settings(words: tuple[str, ...], page: Path | None, as_json: bool) -> None:
    """Show the keys whose name or meaning holds every WORD, e.g. `syncbn settings optim` or `syncbn settings ema`."""
    from dataclasses import asdict

    from syncbn.cli.guard import say
    from syncbn.config.settings import as_page
    from syncbn.config.settings import settings as all_settings
    from syncbn.errors import UsageError

    if page is not None:
        if words:
            raise UsageError("--page writes all settings: leave the words out")
        page.write_text(as_page())
        say({"page": str(page)}, f"{len(list(all_settings()))} settings -> {page}", as_json)
        return
    found = [setting for setting in all_settings() if _fits(setting, words)]
    if not found:
        raise UsageError(f"no setting has {' and '.join(words)} in its name or meaning")
    say([asdict(setting) for setting in found], "\n".join(map(_lines, found)), as_json)


def _fits(setting: "Setting", words: tuple[str, ...]) -> bool:
    text = f"{setting.key} {setting.meaning}".lower()
    return all(word.lower() in text for word in words)


def _lines(setting: "Setting") -> str:
    head = f"{setting.key}={setting.default}"
    return f"{head:<40} ({setting.type})\n    {setting.meaning}"
