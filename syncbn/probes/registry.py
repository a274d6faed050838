"""Probes by name: what makes each of `syncbn.config.PROBES`."""

from syncbn.probes.base import Probe
from syncbn.probes.exchange import ExchangeCost
from syncbn.probes.gradients import Gradients
from syncbn.probes.leak import Leak
from syncbn.probes.oracle import Oracle
from syncbn.probes.population import Population
from syncbn.probes.quantiles import Quantiles
from syncbn.probes.saturation import Saturation
from syncbn.probes.shift import Shift
from syncbn.probes.smoothness import Smoothness

PROBES: dict[str, type[Probe]] = {
    "quantiles": Quantiles,
    "shift": Shift,
    "saturation": Saturation,
    "gradients": Gradients,
    "population": Population,
    "smoothness": Smoothness,
    "leak": Leak,
    "exchange": ExchangeCost,
    "oracle": Oracle,
}
"""The class of each probe."""
