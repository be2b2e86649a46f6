"""Energy of a run's devices, out of its steps."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Meter = Callable[[], float]
"""Reads the joules that a device has used since some moment; nan where nobody counts them."""

JOULES_PER_KWH = 3.6e6


def no_meter() -> float:
    """The meter of a device that has none."""
    return math.nan


@dataclass(frozen=True)
class EnergyFigures:
    """Of a run, or of a part of it; nan if no step of it has a figure.

    ``joules``: of all ranks. The other two are sums over sums, because the counter moves too seldom
    for the figure of one short step.
    """

    joules: float
    watts_per_rank: float
    tokens_per_joule: float


@dataclass
class EnergyTally:
    """Takes the steps of a run one by one."""

    _joules: array[float] = field(default_factory=lambda: array("d"))
    _tokens: array[float] = field(default_factory=lambda: array("d"))
    _rank_seconds: array[float] = field(default_factory=lambda: array("d"))

    def add(self, *, joules: float | None, tokens: int, rank_seconds: float) -> None:
        """A step of all ranks; None is nan."""
        self._joules.append(math.nan if joules is None else joules)
        self._tokens.append(tokens)
        self._rank_seconds.append(rank_seconds)

    def figures(self, steps: Iterable[int]) -> EnergyFigures:
        """Of the steps with these numbers, from 0; those without energy are left out."""
        known = [n for n in steps if not math.isnan(self._joules[n])]
        joules = sum(self._joules[n] for n in known)
        seconds = sum(self._rank_seconds[n] for n in known)
        tokens = sum(self._tokens[n] for n in known)
        return EnergyFigures(
            joules=joules if known else math.nan,
            watts_per_rank=joules / seconds if known and seconds else math.nan,
            tokens_per_joule=tokens / joules if joules else math.nan,
        )
