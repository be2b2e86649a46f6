"""Runs of steps that a user writes as FIRST-LAST."""

from __future__ import annotations

import re


def parse_steps(text: str) -> range:
    """The steps of "10-12", or of "10" alone; none of "". ValueError for any other text, for a
    step before 1, and for a run that ends before it begins."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first = int(match[1]) if match else 0
    steps = range(first, int(match[2] or first) + 1) if match else range(0)
    if not steps or first < 1:
        raise ValueError(f"{text!r} are no steps")
    return steps
