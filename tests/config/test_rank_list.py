"""Ranks as a user writes them."""

from __future__ import annotations

import pytest

from distmoe.config.rank_list import parse_ranks


@pytest.mark.parametrize(
    ("text", "ranks"), [("all", [0, 1, 2, 3]), ("2", [2]), ("3,0,3", [0, 3]), ("0", [0])]
)
def test_ranks(text: str, ranks: list[int]) -> None:
    assert parse_ranks(text, 4) == ranks


@pytest.mark.parametrize("text", ["", "4", "0,4", "-1", "a", "0-3", "0,", "0 1"])
def test_no_ranks(text: str) -> None:
    with pytest.raises(ValueError, match="rank"):
        parse_ranks(text, 4)
