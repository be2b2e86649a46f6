"""What takes the time of a step: the names under which the planner adds it up and reports it."""

from __future__ import annotations

from enum import StrEnum


class StepPart(StrEnum):
    """``LAUNCHES``: what the host needs beyond the device. ``EXCHANGE``: what is exposed of it.
    ``CONTEXT``: gathered from the ranks that share sequences, and their gradients."""

    DENSE_PRODUCTS = "dense products"
    ATTENTION = "attention"
    MEMORY_BOUND = "memory-bound"
    LAUNCHES = "launches"
    EXPERTS = "experts"
    EXCHANGE = "exchange"
    CONTEXT = "keys and values"
    SLOWER_RANKS = "slower ranks"
    PARAMETERS = "parameters and gradients"
    OPTIMIZER = "optimizer"


# Parts in which a rank computes nothing.
WAITS = (StepPart.EXCHANGE, StepPart.CONTEXT, StepPart.SLOWER_RANKS, StepPart.PARAMETERS)
