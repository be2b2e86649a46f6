"""Which pairs every program of a product handles: of all blocks at once what each has by itself."""

from __future__ import annotations

import pytest
import torch

from distmoe.kernels.moe_mlp import Runs, RunsOfBlocks
from distmoe.kernels.moe_mlp.triton_backend import tile_list

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# First pair and pair after the last of three experts, in blocks that bring much, nothing, less than
# a pair each, and much again.
BLOCKS = [
    [[0, 40, 90], [33, 48, 90]],
    [[33, 48, 90], [33, 48, 90]],
    [[33, 48, 90], [33, 49, 90]],
    [[33, 49, 90], [40, 90, 91]],
]


@pytest.mark.parametrize("m", [16, 64])
def test_lists_of_blocks(m: int) -> None:
    bounds_b2e = torch.tensor(BLOCKS, dtype=torch.int32, device=DEVICE)
    pairs_b = (bounds_b2e[:, 1] - bounds_b2e[:, 0]).sum(1).tolist()
    together = RunsOfBlocks(bounds_b2e, pairs_b).each()
    for runs, bounds_2e in zip(together, bounds_b2e, strict=True):
        tiles = tile_list(runs, m).tolist()
        if runs.max_pairs:
            assert tiles == tile_list(Runs(bounds_2e, max_pairs=runs.max_pairs), m).tolist()
        begins, ends = bounds_2e.tolist()
        want = [
            [expert, first, end]
            for expert, (begin, end) in enumerate(zip(begins, ends, strict=True))
            for first in range(begin, end, m)
        ]
        found = [list(tile) for tile in zip(*tiles, strict=True)]
        assert found[: len(want)] == want
        assert all(expert == -1 for expert, _, _ in found[len(want) :])
        assert tile_list(runs, m).data_ptr() % 16 == 0


def test_one_launch_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **constants: launches.append(grid)

    monkeypatch.setattr("distmoe.kernels.moe_mlp.triton_backend.tile_list_kernel", Launches())
    bounds_b2e = torch.tensor(BLOCKS, dtype=torch.int32, device=DEVICE)
    for runs in RunsOfBlocks(bounds_b2e, [41, 0, 1, 49]).each():
        tile_list(runs, 16), tile_list(runs, 16)
    assert len(launches) == 1
