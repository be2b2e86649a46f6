"""Offsets beyond 2^31 elements: buffers that large, of which only the last rows are touched.

Memory that nobody touches costs nothing, so this runs wherever 5 GB can be reserved. 32-bit
arithmetic in an address would wrap and read or write somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from test_moe_mlp import backend_or_skip
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, Runs, gluon_tiles, load_backend
from distmoe.kernels.moe_mlp.tiles import CANDIDATES, TileConfig, override
from distmoe.kernels.testing import assert_as_good_as

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = 40
H, I = 16, 512


@pytest.fixture(params=["tma", "pointers", "gluon"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """With small tiles; triton by TMA and by pointers."""
    config = TileConfig(32, 256, 64, 4, 2, tma=request.param == "tma")
    with ExitStack() as stack:
        for kernel in CANDIDATES:
            stack.enter_context(override(kernel, config))
            stack.enter_context(gluon_tiles.override(kernel, TileConfig(64, 64, 16, 4, 2)))
        yield "gluon" if request.param == "gluon" else "triton"


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, torch.float16)


def pieces(
    backend: str, L: int, R: int, x: Tensor, dy: Tensor, row: Tensor, w_in: Tensor, w_out: Tensor
):
    """All pieces for the last PAIRS of L pairs, of rows among the last of R."""
    mlp = backend_or_skip(backend)
    row_L = torch.empty(L, dtype=torch.int32, device=DEVICE)
    row_L[-PAIRS:] = row
    bounds = torch.tensor([L - PAIRS, L], dtype=torch.int32, device=DEVICE)
    index = PairIndex(row_L, bounds, row_L, torch.empty(R + 1, dtype=torch.int32, device=DEVICE))
    runs = Runs(bounds[:, None].contiguous(), max_pairs=PAIRS)
    new = x.new_empty
    z, dz, a, da, y, dx = (new(L, n) for n in (2 * I, 2 * I, I, I, H, H))
    score, dscore = torch.ones(2, L, device=DEVICE).unbind()
    mlp.forward(x, w_in, w_out, index=index, runs=runs, z_LG=z, a_LI=a, y_LH=y)
    mlp.dgrad(
        dy, score, z, w_in, w_out,
        index=index, runs=runs, dz_LG=dz, a_LI=da, dx_LH=dx, dscore_L=dscore,
    )  # fmt: skip
    dw_in, dw_out = mlp.wgrad(x, dy, dz, da, index=index)
    return [v[-PAIRS:].clone() for v in (z, a, dz, da, y, dx, dscore)] + [dw_in, dw_out]


@pytest.mark.parametrize("large", ["pairs", "rows"])
def test_the_end_of_a_large_buffer_is_like_a_small_one(large: str, backend: str) -> None:
    w_in, w_out = normal(1, 2 * I, H), normal(1, H, I)
    row = (torch.arange(PAIRS, dtype=torch.int32, device=DEVICE) * 7) % 12
    x, dy = normal(12, H), normal(12, H) * 0.1
    small = pieces(backend, PAIRS, 12, x, dy, row, w_in, w_out)
    if large == "pairs":
        L = 2**31 // (2 * I) + 2 * PAIRS
        result = pieces(backend, L, 12, x, dy, row, w_in, w_out)
    else:
        R = 2**31 // H + 24
        large_x, large_dy = x.new_empty(R, H), x.new_empty(R, H)
        large_x[0], large_dy[0] = 0, 0
        large_x[-12:], large_dy[-12:] = x, dy
        result = pieces(backend, PAIRS, R, large_x, large_dy, row + (R - 12), w_in, w_out)
    for i, (got, want) in enumerate(zip(result, small, strict=True)):
        assert_as_good_as(got, want, want.float(), f"result {i}")


def row_sums(L: int, R: int, v: Tensor, by_row: Tensor, bounds: Tensor) -> Tensor:
    """Of the last rows of R, over pairs among the last of L."""
    first_row = R - len(bounds) + 1
    v_LH = v.new_empty(L, H)
    v_LH[-len(v) :] = v
    row_offsets_R1 = torch.empty(R + 1, dtype=torch.int32, device=DEVICE)
    row_offsets_R1[first_row:] = bounds
    by_row_L = by_row + (L - len(v))
    index = PairIndex(by_row_L, bounds[:2], by_row_L, row_offsets_R1)
    out_RH = v.new_empty(R, H)
    load_backend("triton").row_sum(
        v_LH, index=index, rows=slice(first_row, R), score_L=None, out_RH=out_RH
    )
    return out_RH[first_row:].clone()


def test_rows_and_pairs_of_a_sum_may_be_far_out() -> None:
    generator = torch.Generator().manual_seed(0)
    by_row = torch.randperm(PAIRS, generator=generator).to(DEVICE, torch.int32)
    bounds = torch.tensor([0, 3, 3, 11, PAIRS], dtype=torch.int32, device=DEVICE)
    v, large = normal(PAIRS, H), 2**31 // H + PAIRS
    want = row_sums(PAIRS, 4, v, by_row, bounds)
    assert want.abs().amax(1).gt(0).tolist() == [True, False, True, True]
    # One at a time: the memory of both would be a device's.
    for L, R in ((large, 4), (PAIRS, large)):
        assert torch.equal(row_sums(L, R, v, by_row, bounds), want)
