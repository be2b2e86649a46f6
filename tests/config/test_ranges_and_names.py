"""The range of every number, and the names that a setting may have."""

from __future__ import annotations

from typing import get_args

import pytest
from config_problems import MakeConfig, problems

from distmoe.config.check import NAMES
from distmoe.config.keys import key_types
from distmoe.config.ranges import RANGES
from distmoe.registry import GATED_ACTIVATIONS


def test_every_number_has_a_range() -> None:
    assert {key for key, kind in key_types().items() if kind in (int, float)} == set(RANGES)


@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_out_of_range_are_named(make_config: MakeConfig, key: str) -> None:
    found = problems(make_config(f"--{key}=-3"))
    assert any(problem.startswith(f"{key} is -3") and "must be" in problem for problem in found)


@pytest.mark.parametrize("text", ["inf", "nan", "1.0"])
def test_open_ends_and_infinities_are_out(make_config: MakeConfig, text: str) -> None:
    (problem,) = problems(make_config(f"--optim.beta1={text}"))
    assert problem == f"optim.beta1 is {text}; it must be in [0, 1)"


@pytest.mark.parametrize("key", sorted(NAMES))
def test_unknown_names_list_the_known_ones(make_config: MakeConfig, key: str) -> None:
    registry, others = NAMES[key]
    known = [*others, *registry]
    near = known[-1] + "x"
    (problem,) = problems(make_config(f"--{key}={near}"))
    assert problem.startswith(f"{key} is '{near}'; it must be one of {', '.join(known)}")
    assert problem.endswith(f"; did you mean {known[-1]}?")


def test_every_activation_is_gated_or_not() -> None:
    assert get_args(key_types()["moe.activation"]) == tuple(GATED_ACTIVATIONS)


def test_nothing_divides_by_a_number_out_of_range(make_config: MakeConfig) -> None:
    found = problems(make_config(*(f"--{key}=0" for key in RANGES)), 4)
    assert found
