"""How ranks are started: on this machine, by Ray Train, or as a job of a Ray cluster.

One decision shapes this package: whatever starts them, ranks do the same work (`rank.run_rank` or
`compare.study.queue.run_trials`) and know nothing of who started them.
"""
