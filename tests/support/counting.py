"""How often a rank exchanges, and by which way."""

import functools
import os

import torch.distributed as dist

from syncbn.norm.comm.exchange import exchange_of


def by_way(way):
    """Decorate a test: groups whose first exchange is in it use this transport."""

    def decorate(test):
        @functools.wraps(test)
        def run(**arguments):
            before = os.environ.get("SYNCBN_EXCHANGE")
            os.environ["SYNCBN_EXCHANGE"] = way
            try:
                test(**arguments)
            finally:
                del os.environ["SYNCBN_EXCHANGE"]
                os.environ |= {} if before is None else {"SYNCBN_EXCHANGE": before}

        return run

    return decorate


def counting():
    """Count this rank's exchanges from here on."""
    exchange, counted = exchange_of(dist.group.WORLD), []
    original = exchange.announce

    def announce(direction, nbytes, what):
        counted.append(direction)
        return original(direction, nbytes, what)

    exchange.announce = announce
    return counted
