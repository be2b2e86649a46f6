"""Every backend of moe_mlp against the reference and autograd, over ragged and empty cases."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, RowBlock, Run, load_backend
from distmoe.kernels.moe_mlp.reference import moe_mlp
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.registry import MOE_MLP_BACKENDS

H, I = 24, 16

# Pairs per expert, and rows: ragged, a starved expert, a single pair, nothing at all.
CASES = {
    "ragged": ([5, 0, 17, 3], 12),
    "aligned": ([8, 8, 16], 20),
    "single_pair_expert": ([0, 1, 0, 40], 64),
    "nothing": ([0, 0], 4),
    "no_rows": ([0], 0),
}


@dataclass
class Problem:
    x_RH: Tensor
    dy_RH: Tensor
    w_in_eGH: Tensor
    w_out_eHI: Tensor
    row_L: Tensor
    expert_L: Tensor
    score_L: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(
            *(t.to(dtype) for t in (self.x_RH, self.dy_RH, self.w_in_eGH, self.w_out_eHI)),
            self.row_L,
            self.expert_L,
            self.score_L,
        )


def make_problem(counts: list[int], num_rows: int) -> Problem:
    generator = torch.Generator().manual_seed(sum(counts) + num_rows)
    rows = [
        torch.randperm(max(num_rows, n), generator=generator)[:n] % num_rows for n in counts if n
    ]
    row_L = torch.cat([r.sort().values for r in rows]) if rows else torch.empty(0)
    return Problem(
        x_RH=torch.randn(num_rows, H, generator=generator),
        dy_RH=torch.randn(num_rows, H, generator=generator),
        w_in_eGH=torch.randn(len(counts), 2 * I, H, generator=generator) * H**-0.5,
        w_out_eHI=torch.randn(len(counts), H, I, generator=generator) * I**-0.5,
        row_L=row_L.int(),
        expert_L=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int(),
        score_L=torch.rand(sum(counts), generator=generator),
    )


def index_of(problem: Problem, counts: list[int]) -> PairIndex:
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    per_row = torch.bincount(problem.row_L.long(), minlength=len(problem.x_RH))
    return PairIndex(
        row_L=problem.row_L,
        offsets_e1=torch.tensor(offsets, dtype=torch.int32),
        offsets_host=tuple(offsets),
        by_row_L=torch.argsort(problem.row_L, stable=True).int(),
        row_offsets_R1=torch.cat([torch.zeros(1), per_row.cumsum(0)]).int(),
    )


def runs_of(counts: list[int], tile: int = 4) -> list[Run]:
    """Single tiles, back to front: a backend may not depend on their order."""
    runs, offset = [], 0
    for expert, count in enumerate(counts):
        for begin in range(0, count, tile):
            runs.append(Run(expert, offset + begin, offset + min(begin + tile, count)))
        offset += count
    return runs[::-1]


def through_autograd(p: Problem) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in (p.x_RH, p.w_in_eGH, p.w_out_eHI, p.score_L)]
    y_RH = moe_mlp(*inputs[:3], row_L=p.row_L, expert_L=p.expert_L, score_L=inputs[3])
    return [y_RH.detach(), *torch.autograd.grad(y_RH, inputs, p.dy_RH)]


def through_pieces(backend: str, p: Problem, counts: list[int]) -> list[Tensor]:
    mlp, index, runs = load_backend(backend), index_of(p, counts), runs_of(counts)
    R, L = len(p.x_RH), len(p.row_L)
    half = int(index.row_offsets_R1[R // 2])
    blocks = [RowBlock(0, R // 2, 0, half), RowBlock(R // 2, R, half, L)]
    new = p.x_RH.new_empty
    z_LG, y_LH, y_RH = new(L, 2 * I), new(L, H), new(R, H)
    dz_LG, a_LI, dx_LH, dx_RH = new(L, 2 * I), new(L, I), new(L, H), new(R, H)
    dscore_L = torch.empty(L)
    mlp.forward(p.x_RH, p.w_in_eGH, p.w_out_eHI, index=index, runs=runs, z_LG=z_LG, y_LH=y_LH)
    mlp.dgrad(
        p.dy_RH, p.score_L, z_LG, p.w_in_eGH, p.w_out_eHI, index=index, runs=runs,
        dz_LG=dz_LG, a_LI=a_LI, dx_LH=dx_LH, dscore_L=dscore_L,
    )  # fmt: skip
    for block in blocks:
        mlp.row_sum(y_LH, index=index, block=block, score_L=p.score_L, out_RH=y_RH)
        mlp.row_sum(dx_LH, index=index, block=block, score_L=None, out_RH=dx_RH)
    dw_in, dw_out = mlp.wgrad(p.x_RH, p.dy_RH, dz_LG, a_LI, index=index)
    return [y_RH, dx_RH, dw_in, dw_out, dscore_L]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", list(MOE_MLP_BACKENDS))
def test_pieces_agree_with_autograd(backend: str, case: str, dtype: torch.dtype) -> None:
    counts, num_rows = CASES[case]
    # Rounded to the dtype first, so that both references start from the same numbers.
    problem = make_problem(counts, num_rows).to(dtype)
    exact = through_autograd(problem.to(torch.float32))
    same_dtype = through_autograd(problem)
    with poisoned_empty():
        result = through_pieces(backend, problem, counts)
    names = ("y", "dx", "dw_in", "dw_out", "dscore")
    for name, got, same, want in zip(names, result, same_dtype, exact, strict=True):
        assert_as_good_as(got, same, want, name)
