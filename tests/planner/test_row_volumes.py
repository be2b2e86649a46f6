"""Formulas of rows against every way in which a token can choose its experts."""

from itertools import combinations

import numpy as np
import pytest

from distmoe.planner.row_volumes import RankLayout, RowVolumes, groups_touched

E, K = 8, 3


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_groups_touched_is_the_mean_over_all_choices(num_groups: int) -> None:
    size = E // num_groups
    touched = [len({expert // size for expert in c}) for c in combinations(range(E), K)]
    assert groups_touched(num_groups, num_experts=E, top_k=K) == pytest.approx(np.mean(touched))


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (4, 4), (4, 2), (8, 2), (8, 1)])
def test_expected_volumes_are_the_counts_of_all_choices(ranks: int, per_node: int) -> None:
    """Tokens that together choose every K of E experts once: uniform routing without chance."""
    choices, layout = list(combinations(range(E), K)), RankLayout(ranks, per_node)
    size = E // ranks
    touched = [{expert // size for expert in choice} for choice in choices]
    nodes = [{rank // per_node for rank in some} for some in touched]
    found = RowVolumes.expected(layout, num_tokens=len(choices), num_experts=E, top_k=K)
    assert found.pairs == pytest.approx(sum(e < size for c in choices for e in c))
    assert found.rows == pytest.approx(sum(0 in some for some in touched))
    assert found.node_rows == pytest.approx(sum(0 in some for some in nodes))
    assert found.times(0.5).rows == 0.5 * found.rows


@pytest.mark.parametrize(
    ("ranks", "copies", "flat", "node"),
    [(16, 4.00, 3.26, 1.00), (32, 6.00, 5.45, 2.71), (64, 7.00, 6.72, 4.63)],
)
def test_rows_of_a_token_between_nodes_of_eight(
    ranks: int, copies: float, flat: float, node: float
) -> None:
    """E = 256, K = 8: the figures of docs/planning.md."""
    layout = RankLayout(ranks, 8)
    volumes = RowVolumes.expected(layout, num_tokens=1, num_experts=256, top_k=8)
    assert layout.far_ranks * volumes.sent_rows("copies") == pytest.approx(copies, abs=0.005)
    assert layout.far_ranks * volumes.sent_rows("rank") == pytest.approx(flat, abs=0.005)
    assert (layout.num_nodes - 1) * volumes.node_rows == pytest.approx(node, abs=0.005)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"per_node is 3; it must divide .* \(4\)"):
        RankLayout(4, 3)
    with pytest.raises(ValueError, match="num_experts is 6; the 4 ranks must divide it"):
        RowVolumes.expected(RankLayout(4, 2), num_tokens=1, num_experts=6, top_k=2)
