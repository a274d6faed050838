"""An extension that writes down what each rank of a run does: its process, and the samples of every step.

`observed/rank-N.jsonl` in the run's folder has a line `{"pid", "time"}` for each attempt and a line
`{"step", "samples", "time"}` for each step, with a digest of every sample that the step saw.
"""

import hashlib
import json
import os
import time

import syncbn.extend as extend


@extend.callback("observer")
class Observer(extend.Callback):
    """Observes; `pause_s` more in each step leave time for a fault in it."""

    def __init__(self, *, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s
        self._samples: list[str] = []

    def start(self, moment: extend.Moment) -> None:
        """Open the file of this rank, and look from now on at what goes into the model."""
        folder = moment.folder / "observed"
        folder.mkdir(exist_ok=True)
        self._file = (folder / f"rank-{moment.rank}.jsonl").open("a", buffering=1)
        self._write(pid=os.getpid())
        moment.model.register_forward_pre_hook(self._see)

    def after_step(self, moment: extend.Moment) -> None:
        """Write down the step."""
        self._write(step=moment.step, samples=self._samples)
        self._samples = []
        time.sleep(self._pause_s)

    def _see(self, model, inputs) -> None:
        if model.training:
            self._samples += [
                hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:12] for sample in inputs[0]
            ]

    def _write(self, **fields) -> None:
        self._file.write(json.dumps({**fields, "time": time.time()}) + "\n")
