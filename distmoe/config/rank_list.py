"""Ranks that a user writes as "all", or as numbers such as "0,8"."""

from __future__ import annotations

import re


def parse_ranks(text: str, world: int) -> list[int]:
    """The ranks of ``text`` among ``world``, in order. ValueError for any other text, and for a
    rank that there is not."""
    if text == "all":
        return list(range(world))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"{text!r} are no ranks")
    ranks = sorted({int(number) for number in text.split(",")})
    if ranks[-1] >= world:
        raise ValueError(f"there is no rank {ranks[-1]} among {world}")
    return ranks
