"""Which names select which shapes."""

import pytest

from distmoe.bench.kernels.shapes import SHAPES, find_shapes


def names(*words: str) -> list[str]:
    return [shape.name for shape in find_shapes(words)]


def test_size_of_the_papers_table_is_three_shapes() -> None:
    assert names("7B") == ["7B-256", "7B-512", "7B-1024"]
    assert names("tiny", "7B-512", "7B") == ["tiny", "7B-512", "7B-256", "7B-1024"]


@pytest.mark.parametrize("size", ["1.4B", "7B", "30B", "120B"])
def test_shapes_of_one_size_cost_the_same(size: str) -> None:
    """The paper's table keeps I K and I E fixed in a size."""
    shapes = find_shapes([size])
    assert len({(s.T, s.H, s.I * s.K, s.I * s.E) for s in shapes}) == 1


def test_names_of_models_are_whole_names() -> None:
    assert names("Qwen3-30B-A3B", "TR") == ["Qwen3-30B-A3B", "TR"]
    for word in ("Qwen3-30B", "9B", ""):
        with pytest.raises(ValueError, match=f"unknown shape '{word}'; known: 1.4B, 7B"):
            find_shapes([word])


def test_all_shapes_can_be_found_by_their_name() -> None:
    assert [find_shapes([name])[0].name for name in SHAPES] == list(SHAPES)
