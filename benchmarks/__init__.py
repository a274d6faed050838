"""Speed of the layer against its peers and against the limit of the machine: `make bench`.

Times of one machine mean little on another, so what counts are ratios of contenders that took turns in one run.
Measuring (`layer`, `exchange`, `model`, `fused`, each run in ranks by `ranks`) writes one JSON file; everything
shown (`verdicts`, `page`, `plots`) is a pure function of it.
"""
