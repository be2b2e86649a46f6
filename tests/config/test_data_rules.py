"""The prepared data against the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_problems import MakeData, problems

from distmoe.config import Config, apply_overrides, check
from distmoe.config.sample_ranges import in_words, sample_ranges, without


def test_missing_data_says_how_to_make_it() -> None:
    config = apply_overrides(Config(), ["--data.path", "no/data"])
    assert problems(config) == [
        "data.path is 'no/data'; no manifest.json there; make one with: "
        "distmoe data prepare INPUT --out no/data"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"vocab_size": 5, "splits": {"train": 3}}'])
def test_broken_manifest(make_data: MakeData, text: str) -> None:
    folder = make_data()
    (Path(folder) / "manifest.json").write_text(text)
    (problem,) = problems(apply_overrides(Config(), ["--data.path", folder]))
    assert problem.startswith(f"data.path is '{folder}'; its manifest.json cannot be read (")


@pytest.mark.parametrize(
    ("split", "name", "needed"),
    [("train", "training", 16 * 256 + 1), ("validation", "validation", 8 * 16 * 256 + 1)],
)
def test_splits_must_be_long_enough(
    make_data: MakeData, split: str, name: str, needed: int
) -> None:
    config = apply_overrides(Config(), ["--data.path", make_data(**{split: needed})])
    check(config, 1)
    make_data(**{split: needed - 1})
    (problem,) = problems(config)
    assert problem.startswith(f"data.path is '{config.data.path}'; its {name} split has ")


def test_ranges_of_samples_are_joined() -> None:
    assert sample_ranges(["30:40", "5:10", "8:12", "12:13", "35:36"]) == (
        range(5, 13),
        range(30, 40),
    )


@pytest.mark.parametrize(
    ("others", "left"),
    [
        (["1:3"], "5:13, 30:40"),
        (["5:13"], "30:40"),
        (["8:10", "12:35"], "5:8, 10:12, 35:40"),
        (["0:50"], ""),
    ],
)
def test_ranges_of_samples_without_others(others: list[str], left: str) -> None:
    found = without(sample_ranges(["5:13", "30:40"]), sample_ranges(others))
    assert in_words(found) == left


@pytest.mark.parametrize("entry", ["", "5", "5-9", "9:5", "5:5", "-1:5", "1:2:3", "a:b"])
def test_what_is_no_range_of_samples(make_data: MakeData, entry: str) -> None:
    config = apply_overrides(Config(), ["--data.path", make_data(), "--data.skip", "1:2", entry])
    (problem,) = problems(config)
    assert problem.startswith(f"data.skip has '{entry}'; it must be FIRST:END, two sample numbers")
