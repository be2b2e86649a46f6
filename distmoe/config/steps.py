"""Runs of steps that a user writes as FIRST-LAST."""

from __future__ import annotations


def parse_steps(text: str) -> range:
    """The steps of "10-12", or of "10" alone; none of "". ValueError for any other text, for a
    step before 1, and for a run that ends before it begins."""
    if not text:
        return range(0)
    first, _, last = text.partition("-")
    steps = range(int(first), int(last or first) + 1)
    if not steps or steps[0] < 1:
        raise ValueError(f"{text!r} are no steps")
    return steps
