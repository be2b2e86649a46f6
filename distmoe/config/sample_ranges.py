"""Ranges of samples that a user writes as FIRST:END, such as those that data.skip leaves out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distmoe.config.errors import ConfigError


def sample_ranges(skip: Sequence[str]) -> tuple[range, ...]:
    """The ranges of data.skip in rising order, with nothing between those that are one; the end is
    outside. ConfigError, a line for every wrong entry."""
    ranges, problems = [], []
    for entry in skip:
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", entry)
        if match is None or int(match[1]) >= int(match[2]):
            problems.append(
                f"data.skip has '{entry}'; it must be FIRST:END, two sample numbers of which the "
                "second is larger and not left out, such as '1000:1200'"
            )
        else:
            ranges.append(range(int(match[1]), int(match[2])))
    if problems:
        raise ConfigError(problems)
    return _joined(sorted(ranges, key=lambda left_out: left_out.start))


def without(ranges: Sequence[range], others: Sequence[range]) -> tuple[range, ...]:
    """What of ``ranges`` lies in none of ``others``."""
    for other in others:
        parts = [
            part
            for one in ranges
            for part in (
                range(one.start, min(one.stop, other.start)),
                range(max(one.start, other.stop), one.stop),
            )
        ]
        ranges = [part for part in parts if part]
    return tuple(ranges)


def as_written(ranges: Sequence[range]) -> list[str]:
    """Entries of data.skip that say the same."""
    return [f"{left_out.start}:{left_out.stop}" for left_out in ranges]


def in_words(ranges: Sequence[range]) -> str:
    """As a user writes them."""
    return ", ".join(as_written(ranges))


def _joined(ranges: list[range]) -> tuple[range, ...]:
    joined: list[range] = []
    for left_out in ranges:
        if joined and left_out.start <= joined[-1].stop:
            before = joined.pop()
            left_out = range(before.start, max(before.stop, left_out.stop))
        joined.append(left_out)
    return tuple(joined)
