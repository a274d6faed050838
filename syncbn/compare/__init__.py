"""A study: its trials, the statistics and verdicts on them, its figures and its report.

One decision shapes this package: what is said of a study is made from the files of its trials alone, so it can be
made again, later or elsewhere, without training anything.
"""
