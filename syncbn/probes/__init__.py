"""Probes by name: measurements inside a network while it trains, which leave the training as it is.

A probe sees the run between the backward pass and the optimiser's step, through a `View`, and gives numbers back. It
changes nothing that training reads - parameters, gradients, buffers, modes, random states - so a run with probes has
the bits of one without. Without probes the loop pays one test a step.
"""

from syncbn.probes.base import Probe
from syncbn.probes.registry import PROBES
from syncbn.probes.running import Probes
from syncbn.probes.view import Batch, View

__all__ = ["PROBES", "Batch", "Probe", "Probes", "View"]
