"""The report of a study in three dresses: Markdown, a self-contained HTML page, a table for the terminal.

The decision that shaped the file: all three are filled from the same rows of words, made once from the
summary, so they differ in dress only. Every text is escaped where it enters a format, and nowhere else.
"""

from syncbn.compare.page import Page
from syncbn.compare.report_html import html
from syncbn.compare.report_markdown import markdown
from syncbn.compare.report_terminal import print_table

__all__ = ["Page", "html", "markdown", "print_table"]
