"""Statistics over the seeds of a study: effects and intervals, tests, and claims judged by them. All of it is pure."""
