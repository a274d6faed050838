"""Probe `leak`: whether a network reads in its batch what it should read in the image.

Where a rank's samples are alike, their common statistics give the class away, and a network learns to use that. It
then does well in training mode, and badly in evaluation mode on the very same samples. (Momentum Contrast and SimCLR
shuffle or synchronise batches against it; Wu & Johnson 2021, section 6.)
"""

import math

from syncbn.probes.aside import norms_in_training
from syncbn.probes.base import Probe, require_classification, require_one_process
from syncbn.probes.measuring import error_rate
from syncbn.probes.view import View

BATCHES = 50


class Leak(Probe):
    """The finished network's error on the last 50 training batches, dealt to ranks as they were in training.

    Finals: `train_mode_error`, with the batch statistics that the arm trains with (dropout is off);
    `eval_mode_error`, with running statistics; `leak_gap`, evaluation - training mode.

    A gap alone does not prove a leak: with `norm=local` rank 0's running statistics stand for all, and dealt by class
    they are those of few classes. `norm=local_avg`, which averages them over ranks, takes that part out of the gap.

    Raises:
        UsageError: several real ranks; another task than classification.
    """

    def __init__(self, view: View) -> None:
        require_one_process(view, "leak")
        require_classification(view, "leak")

    def conclude(self, view: View) -> dict[str, float]:
        """See `Probe`."""
        view.model.eval()
        eval_mode = error_rate(view, view.trained_on(BATCHES)) if view.step else math.nan
        with norms_in_training(view.model):
            train_mode = error_rate(view, view.trained_on(BATCHES)) if view.step else math.nan
        return {
            "train_mode_error": train_mode,
            "eval_mode_error": eval_mode,
            "leak_gap": eval_mode - train_mode,
        }
