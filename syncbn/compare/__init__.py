"""A study compared: statistics and verdicts on its trials, its figures and its report.

What is said of a study is made from the files of its trials alone, so it can be made again, later or elsewhere, without
training. `statistics` is pure; `study` runs trials and sums them up; `advice` and `regression` judge summaries;
`report` words and draws them; `suite` covers all studies together; `results` writes a study's files.
"""
