"""Steps as a user writes them."""

from __future__ import annotations

import pytest

from distmoe.config.steps import parse_steps


@pytest.mark.parametrize(
    ("text", "steps"), [("", []), ("7", [7]), ("9-11", [9, 10, 11]), ("3-3", [3])]
)
def test_steps(text: str, steps: list[int]) -> None:
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["5-3", "0-2", "0", "-4", "a-b", "2-", "1-2-3", "1,2"])
def test_no_steps(text: str) -> None:
    with pytest.raises(ValueError, match="are no steps"):
        parse_steps(text)
