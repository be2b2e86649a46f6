"""Formulas of rows against every way in which a token can choose its experts."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from distmoe.planner.row_volumes import RankLayout, RowVolumes, groups_touched

E, K = 8, 3


def all_choices() -> NDArray[np.bool_]:
    """Tokens that together choose every K of E experts once: uniform routing without chance."""
    choices = list(combinations(range(E), K))
    selected_TE = np.zeros((len(choices), E), dtype=bool)
    for token, choice in enumerate(choices):
        selected_TE[token, list(choice)] = True
    return selected_TE


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_groups_touched_is_the_mean_over_all_choices(num_groups: int) -> None:
    size = E // num_groups
    touched = [len({expert // size for expert in c}) for c in combinations(range(E), K)]
    assert groups_touched(num_groups, num_experts=E, top_k=K) == pytest.approx(np.mean(touched))


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (4, 4), (4, 2), (8, 2), (8, 1)])
def test_expected_volumes_are_the_counts_of_all_choices(ranks: int, per_node: int) -> None:
    selected_TE, layout = all_choices(), RankLayout(ranks, per_node)
    expected = RowVolumes.expected(layout, num_tokens=len(selected_TE), num_experts=E, top_k=K)
    for rank in range(ranks):
        counted = RowVolumes.counted(selected_TE, layout, rank=rank)
        np.testing.assert_allclose(counted.pairs_NG, expected.pairs_NG)
        np.testing.assert_allclose(counted.rows_NG, expected.rows_NG)
        np.testing.assert_allclose(counted.node_rows_N, expected.node_rows_N)


def test_counts_are_placed_as_the_rank_sees_its_peers() -> None:
    """A token with two experts of rank 0 and one of each of the ranks 2, 5 and 7, seen by rank 1 of
    eight, four on a node."""
    selected_TE = np.zeros((1, 16), dtype=bool)
    selected_TE[0, [0, 1, 4, 10, 15]] = True
    seen = RowVolumes.counted(selected_TE, RankLayout(8, 4), rank=1)
    assert seen.pairs_NG.tolist() == [[0, 1, 0, 2], [1, 0, 1, 0]]
    assert seen.rows_NG.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert seen.node_rows_N.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("ranks", "copies", "flat", "node"),
    [(16, 4.00, 3.26, 1.00), (32, 6.00, 5.45, 2.71), (64, 7.00, 6.72, 4.63)],
)
def test_rows_of_a_token_between_nodes_of_eight(
    ranks: int, copies: float, flat: float, node: float
) -> None:
    """E = 256, K = 8: the figures of docs/planning.md."""
    volumes = RowVolumes.expected(RankLayout(ranks, 8), num_tokens=1, num_experts=256, top_k=8)
    assert volumes.pairs_NG[1:].sum() == pytest.approx(copies, abs=0.005)
    assert volumes.rows_NG[1:].sum() == pytest.approx(flat, abs=0.005)
    assert volumes.node_rows_N[1:].sum() == pytest.approx(node, abs=0.005)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"per_node is 3; it must divide .* \(4\)"):
        RankLayout(4, 3)
    with pytest.raises(ValueError, match="num_experts is 6; the 4 ranks must divide it"):
        RowVolumes.expected(RankLayout(4, 2), num_tokens=1, num_experts=6, top_k=2)
