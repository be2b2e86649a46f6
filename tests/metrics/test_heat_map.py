"""Shapes and shades of the picture."""

from __future__ import annotations

import numpy as np

from distmoe.metrics.heat_map import DEAD, EVEN, GRID, OVER, UNDER, heat_map


def test_a_square_per_layer_and_expert() -> None:
    image = heat_map(np.arange(6).reshape(2, 3), cell=4)
    assert image.shape == (8, 12, 3)
    assert image.dtype == np.uint8
    for row, column in np.ndindex(2, 3):
        square = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 3)
        assert (square == square[0]).all()


def test_shades() -> None:
    """The mean is 16: none, a sixteenth, the mean, the double and more than four times."""
    image = heat_map(np.array([[0, 1, 16, 32, 96, 0, 0, 0, 0]]), cell=1)[0]
    assert (image[0] == DEAD).all()
    assert (image[1] == UNDER).all()
    assert np.abs(image[2].astype(int) - EVEN).max() <= 1
    halfway = (EVEN + OVER) / 2
    assert np.abs(image[3] - halfway).max() < 8
    assert (image[4] == OVER).all()


def test_cells_shrink_for_many_experts_and_have_lines_while_they_are_large() -> None:
    few, many = heat_map(np.ones((2, 16), int)), heat_map(np.ones((2, 512), int))
    assert few.shape == (64, 512, 3)
    assert (few[31] == GRID).all()
    assert (few[:, 31] == GRID).all()
    assert many.shape == (8, 2048, 3)
    assert (many == EVEN).all()


def test_a_layer_without_tokens_is_black() -> None:
    assert (heat_map(np.zeros((1, 4), int), cell=1) == DEAD).all()
