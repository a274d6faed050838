"""The report of a sweep, as Markdown and as one HTML page.

Both have the best trial, the figure, all trials, what failed, and the command, in this order.
"""

import json
from html import escape

from syncbn.compare.report.figures.canvas import Picture
from syncbn.compare.report.html import document, figure, grid, paragraph
from syncbn.compare.report.words.sweep import SweepSummary, headline, tally
from syncbn.compare.report.words.text import escaped, markdown_table
from syncbn.compare.sweep.tables import failure_rows, trial_header, trial_rows

FAILURES = ("trial", "what it said")


def markdown(summary: SweepSummary, picture: Picture) -> str:
    """The report as Markdown; the figure is a link into `figures/`."""
    failures = failure_rows(summary)
    parts = [
        f"# Sweep {escaped(summary['sweep'])}",
        f"**{escaped(headline(summary))}.** {tally(summary)}.",
        *(f"```\n{command}\n```" for command in _best_command(summary)),
        "## Figures",
        f"![{escaped(picture.title)}](figures/{picture.name}.png)",
        "## Trials",
        markdown_table([*map(escaped, trial_header(summary))], trial_rows(summary)),
        *(["## Failures", markdown_table(FAILURES, failures)] if failures else []),
        "## Repeat it",
        f"```\n{summary['command']}\n```",
        "## Versions",
        markdown_table(("package", "version"), _versions(summary)),
        "## Config",
        "What decides the numbers of the first trial.",
        f"```json\n{json.dumps(summary['config'], indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def html(summary: SweepSummary, picture: Picture) -> str:
    """The report as one HTML file that loads nothing from outside itself."""
    failures = failure_rows(summary)
    config = escape(json.dumps(summary["config"], indent=2))
    parts = [
        f'<p class="soft">Sweep</p><h1>{escape(summary["sweep"])}</h1>',
        f"{paragraph(headline(summary) + '.')}{paragraph(tally(summary) + '.', 'soft')}",
        *(f'<pre class="wrap">{escape(command)}</pre>' for command in _best_command(summary)),
        figure(picture),
        f"<h2>Trials</h2>{grid(trial_header(summary), trial_rows(summary))}",
        f"<h2>Failures</h2>{grid(FAILURES, failures)}" if failures else "",
        f'<h2>Repeat it</h2><pre class="wrap">{escape(summary["command"])}</pre>',
        f"<h2>Versions</h2>{grid(('package', 'version'), _versions(summary))}",
        "<h2>Config</h2><details><summary>What decides the numbers of the first trial</summary>",
        f"<pre>{config}</pre></details>",
    ]
    return document(f"Sweep {summary['sweep']}", "\n".join(parts))


def _best_command(summary: SweepSummary) -> list[str]:
    """The command that trains the best trial alone, where there is one."""
    return [] if summary["best_command"] is None else [summary["best_command"]]


def _versions(summary: SweepSummary) -> list[tuple[str, str]]:
    return [*summary["versions"].items(), ("git", summary["git"])]
