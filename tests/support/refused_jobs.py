"""Jobs that cannot run: settings, environment, exit code, and words of the line; for a cluster of two CPUs."""

REFUSED = [
    (["launcher.num_workers=3"], {}, 2, "needs 3 CPUs"),
    (["launcher.gpus_per_worker=1"], {}, 2, "needs 1 GPUs"),
    (["optim.lr=abc"], {}, 2, "abc"),
    ([], {"RAY_AUTH_TOKEN": "wrong"}, 7, "refuses this token"),
    ([], {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, 7, "no token"),
    ([], {"SYNCBN_ADDRESS": "http://127.0.0.1:1"}, 6, "no Ray dashboard answers"),
]
