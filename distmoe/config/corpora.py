"""The folders that a run trains on and their shares: data.path alone, or those of data.mix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

from distmoe.config.errors import ConfigError
from distmoe.config.schema import DataConfig

LARGEST_PERIOD = 100_000
"""Shares of a mix, as whole numbers without a common divisor, add up to at most this many."""

_WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")


@dataclass(frozen=True)
class Corpus:
    """A prepared folder. It gives ``share`` of every ``period`` samples, whole numbers."""

    path: str
    share: int
    period: int

    @property
    def weight(self) -> float:
        """The share of all samples, in (0, 1]."""
        return self.share / self.period


def corpora(data: DataConfig) -> tuple[Corpus, ...]:
    """The folders in the order of data.mix; ConfigError, a line for every wrong entry."""
    if not data.mix:
        return (Corpus(data.path, 1, 1),)
    weights: dict[str, Fraction] = {}
    problems = []
    for entry in data.mix:
        path, _, weight = entry.rpartition(":")
        if not path or not _WEIGHT.fullmatch(weight) or not Fraction(weight):
            problems.append(
                f"data.mix has '{entry}'; it must be FOLDER:WEIGHT with a number above 0, such as "
                "'data/web:0.7'"
            )
        elif path in weights:
            problems.append(f"data.mix has the folder '{path}' twice; each may be there once")
        else:
            weights[path] = Fraction(weight)
    if problems:
        raise ConfigError(problems)
    shares = _whole_shares(list(weights.values()))
    return tuple(
        Corpus(path, share, sum(shares)) for path, share in zip(weights, shares, strict=True)
    )


def _whole_shares(weights: list[Fraction]) -> list[int]:
    """The smallest whole numbers of the same proportions; ConfigError if they are too large."""
    unit = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    shares = [number // gcd(*whole) for number in whole]
    if sum(shares) > LARGEST_PERIOD:
        raise ConfigError(
            f"data.mix has weights of the proportions {':'.join(map(str, shares))}; these whole "
            f"numbers must add up to at most {LARGEST_PERIOD:,}: give fewer digits"
        )
    return shares
