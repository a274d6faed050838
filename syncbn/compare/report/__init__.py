"""The report of a study: its words, tables and figures, as Markdown, HTML and for the terminal."""
