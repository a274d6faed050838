"""How ranks are started: on this machine, by Ray, or as a job of a Ray cluster.

Whatever starts them, ranks do the same work (`rank.run_rank` or `compare.study.queue.run_trials`) and know nothing of
who started them.
"""
