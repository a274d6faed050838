"""The figures of a study, each titled with what it found.

The decision that shaped the package: a title is computed from the numbers under it, so a figure can contradict
what was hoped for but never itself. Curves come from the trials, everything else from the summary.
"""

from syncbn.compare.figures.gallery import draw

__all__ = ["draw"]
