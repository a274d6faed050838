"""The figures of a study, each titled with what it found.

A title is computed from the numbers under it, so it cannot contradict them. Curves come from the trials, everything
else from the summary. `gallery.draw` draws all that a study has numbers for.
"""
