"""The one training loop, `train(cfg, runtime, tracker) -> RunSummary`, whatever started the ranks.

`loop` orders the parts: `state` is what a checkpoint holds, `agreement` the small collective by which ranks decide
alike, `evaluation` measures, `stopping` handles signals. Options have files of their own: `precision`, `accumulate`,
`ema`, and `network` for how the network is computed.
"""

from syncbn.train.loop import train
from syncbn.train.record import recorded_run
from syncbn.train.summary import RunSummary

__all__ = ["RunSummary", "recorded_run", "train"]
