"""Every backend of moe_mlp against the reference and autograd, over ragged and empty cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from distmoe.kernels.moe_mlp import MoeMlp, PairIndex, Runs, gluon_backend, load_backend
from distmoe.kernels.moe_mlp.activations import ACTIVATIONS
from distmoe.kernels.moe_mlp.reference import moe_mlp
from distmoe.kernels.moe_mlp.tiles import CANDIDATES, TileConfig, override
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.registry import MOE_MLP_BACKENDS

# In the interpreter a number that overflows is memory that nobody meant to read.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("y", "dx", "dw_in", "dw_out", "dscore")

# Pairs per expert, rows, H and I: ragged, aligned, a starved expert, a single pair, nothing at all,
# widths below a tile, above one, and such that a row is no multiple of 16 bytes.
CASES = {
    "ragged": ([5, 0, 17, 3], 12, 24, 16),
    "aligned": ([16, 0, 32], 20, 32, 16),
    "many_tiles": ([33, 16, 0, 1], 40, 48, 48),
    "odd_widths": ([9, 4, 20], 15, 36, 20),
    "single_pair_expert": ([0, 1, 0, 40], 64, 24, 16),
    "nothing": ([0, 0], 4, 24, 16),
    "no_rows": ([0], 0, 24, 16),
}

SMALL = TileConfig(16, 16, 16, num_warps=4, num_stages=2)
TILINGS = {
    "small": SMALL,
    "chunks": replace(SMALL, n=64, chunks=4),
    "pointers": replace(SMALL, n=32, chunks=2, tma=False),
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
    activation: str

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            x_RH=self.x_RH.to(dtype),
            dy_RH=self.dy_RH.to(dtype),
            w_in_eGH=self.w_in_eGH.to(dtype),
            w_out_eHI=self.w_out_eHI.to(dtype),
        )


def make_problem(case: str, activation: str = "swiglu") -> Problem:
    counts, num_rows, H, I = CASES[case]
    generator = torch.Generator().manual_seed(sum(counts) + num_rows)
    rows = [
        torch.randperm(max(num_rows, n), generator=generator)[:n] % num_rows for n in counts if n
    ]
    row_L = torch.cat([r.sort().values for r in rows]) if rows else torch.empty(0)
    G = ACTIVATIONS[activation].width(I)
    problem = Problem(
        x_RH=torch.randn(num_rows, H, generator=generator),
        dy_RH=torch.randn(num_rows, H, generator=generator),
        w_in_eGH=torch.randn(len(counts), G, H, generator=generator) * H**-0.5,
        w_out_eHI=torch.randn(len(counts), H, I, generator=generator) * I**-0.5,
        row_L=row_L.int(),
        expert_L=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int(),
        score_L=torch.rand(sum(counts), generator=generator),
        activation=activation,
    )
    on_device = {k: v.to(DEVICE) for k, v in vars(problem).items() if isinstance(v, Tensor)}
    return replace(problem, **on_device)


def index_of(problem: Problem, counts: list[int], *, tail: int = 0) -> PairIndex:
    """``tail``: entries behind the last pair, which nobody may read (row 0 keeps them in range)."""
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], device=DEVICE)
    per_row = torch.bincount(problem.row_L.long(), minlength=len(problem.x_RH))
    nothing = torch.zeros(tail, dtype=torch.int32, device=DEVICE)
    return PairIndex(
        row_L=torch.cat([problem.row_L, nothing]),
        offsets_e1=offsets.int(),
        by_row_L=torch.cat([torch.argsort(problem.row_L, stable=True).int(), nothing]),
        row_offsets_R1=torch.cat([per_row.new_zeros(1), per_row.cumsum(0)]).int(),
    )


def steps_of(index: PairIndex, tile: int) -> list[Runs]:
    """Two calls: the whole tiles of every expert, then what is left, second half first."""
    begin_e, end_e = index.offsets_e1[:-1], index.offsets_e1[1:]
    cut_e = begin_e + (end_e - begin_e) // 2 // tile * tile
    bounds = [torch.stack([cut_e, end_e]), torch.stack([begin_e, cut_e])]
    return [Runs(b.contiguous(), max_pairs=len(index.row_L)) for b in bounds]


def through_autograd(p: Problem) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in (p.x_RH, p.w_in_eGH, p.w_out_eHI, p.score_L)]
    y_RH = moe_mlp(
        *inputs[:3],
        row_L=p.row_L,
        expert_L=p.expert_L,
        score_L=inputs[3],
        activation=p.activation,
    )
    return [y_RH.detach(), *torch.autograd.grad(y_RH, inputs, p.dy_RH)]


def through_pieces(mlp: MoeMlp, p: Problem, index: PairIndex, steps: list[Runs]) -> list[Tensor]:
    R, H = p.x_RH.shape
    L, I, G = len(index.row_L), p.w_out_eHI.shape[2], p.w_in_eGH.shape[1]
    new = p.x_RH.new_empty
    z_LG, a_LI, y_LH, y_RH = new(L, G), new(L, I), new(L, H), new(R, H)
    dz_LG, da_LI, dx_LH, dx_RH = new(L, G), new(L, I), new(L, H), new(R, H)
    dscore_L = torch.empty(L, device=DEVICE)
    score_L = torch.full((L,), float("nan"), device=DEVICE)
    score_L[: len(p.score_L)] = p.score_L
    for runs in steps:
        mlp.forward(
            p.x_RH, p.w_in_eGH, p.w_out_eHI,
            index=index, runs=runs, z_LG=z_LG, a_LI=a_LI, y_LH=y_LH,
        )  # fmt: skip
    for runs in steps:
        mlp.dgrad(
            p.dy_RH, score_L, z_LG, p.w_in_eGH, p.w_out_eHI, index=index, runs=runs,
            dz_LG=dz_LG, a_LI=da_LI, dx_LH=dx_LH, dscore_L=dscore_L,
        )  # fmt: skip
    for rows in (slice(0, R // 2), slice(R // 2, R)):
        mlp.row_sum(y_LH, index=index, rows=rows, score_L=score_L, out_RH=y_RH)
        mlp.row_sum(dx_LH, index=index, rows=rows, score_L=None, out_RH=dx_RH)
    dw_in, dw_out = mlp.wgrad(p.x_RH, p.dy_RH, dz_LG, da_LI, index=index)
    return [y_RH, dx_RH, dw_in, dw_out, dscore_L[: len(p.score_L)]]


# What a backend says of another device, or of an activation that a package does not have.
REFUSALS = r"backend 'gluon' needs a GPU of|is not supported by the moe_mlp backend 'sonicmoe'"


def backend_or_skip(name: str, activation: str = "swiglu") -> MoeMlp:
    try:
        if name == "gluon":
            gluon_backend.multiprocessors(DEVICE)
        return load_backend(name, activation)
    except ImportError as error:
        pytest.skip(str(error))
    except ValueError as error:
        if not re.search(REFUSALS, str(error)):
            raise
        pytest.skip(str(error))


@contextmanager
def tiling(config: TileConfig) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel in CANDIDATES:
            stack.enter_context(override(kernel, config))
        yield


def check(mlp: MoeMlp, p: Problem, index: PairIndex, steps: list[Runs]) -> None:
    exact = through_autograd(p.to(torch.float32))
    same_dtype = through_autograd(p)
    with poisoned_empty():
        result = through_pieces(mlp, p, index, steps)
    for name, got, same, want in zip(NAMES, result, same_dtype, exact, strict=True):
        assert_as_good_as(got, same, want, name)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        (backend, case, dtype)
        for backend in MOE_MLP_BACKENDS
        for case in CASES
        for dtype in DTYPES
        # In fp32 it is the backend triton; fp16 is in test_gluon_moe_mlp.
        if backend != "gluon" or dtype == torch.bfloat16 or case == "ragged"
    ],
)
def test_pieces_agree_with_autograd(backend: str, case: str, dtype: torch.dtype) -> None:
    mlp = backend_or_skip(backend)
    # Rounded to the dtype first, so that both references start from the same numbers.
    problem = make_problem(case).to(dtype)
    index = index_of(problem, CASES[case][0])
    check(mlp, problem, index, [Runs.of_all(index)])


@pytest.mark.parametrize("backend", list(MOE_MLP_BACKENDS))
@pytest.mark.parametrize("case", ["ragged", "many_tiles", "nothing"])
def test_steps_and_a_tail_behind_the_pairs(backend: str, case: str) -> None:
    mlp = backend_or_skip(backend)
    problem = make_problem(case).to(torch.bfloat16)
    index = index_of(problem, CASES[case][0], tail=21)
    with tiling(SMALL):
        check(mlp, problem, index, steps_of(index, SMALL.m))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("backend", list(MOE_MLP_BACKENDS))
def test_activations(backend: str, activation: str) -> None:
    mlp = backend_or_skip(backend, activation)
    problem = make_problem("ragged", activation).to(torch.bfloat16)
    index = index_of(problem, CASES["ragged"][0])
    check(mlp, problem, index, [Runs.of_all(index)])


@pytest.mark.parametrize("tiles", TILINGS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("ragged", torch.float16),
        *((case, torch.bfloat16) for case in ("ragged", "aligned", "many_tiles", "odd_widths")),
    ],
)
def test_tilings_of_the_fused_kernels(case: str, dtype: torch.dtype, tiles: str) -> None:
    mlp = backend_or_skip("triton")
    problem = make_problem(case).to(dtype)
    index = index_of(problem, CASES[case][0])
    with tiling(TILINGS[tiles]):
        check(mlp, problem, index, [Runs.of_all(index)])


@pytest.mark.parametrize("backend", list(MOE_MLP_BACKENDS))
def test_neither_steps_nor_another_run_change_a_bit(backend: str) -> None:
    mlp = backend_or_skip(backend)
    problem = make_problem("many_tiles").to(torch.bfloat16)
    index = index_of(problem, CASES["many_tiles"][0])
    with tiling(SMALL):
        whole, again = (through_pieces(mlp, problem, index, [Runs.of_all(index)]) for _ in range(2))
        cut = through_pieces(mlp, problem, index, steps_of(index, SMALL.m))
    for results in zip(whole, again, cut, strict=True):
        assert all(torch.equal(result, results[0]) for result in results)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh'; known: geglu, gelu"):
        load_backend("torch", "tanh")
    with (
        pytest.raises(ValueError, match="unknown kernel 'x'; known: up, down"),
        override("x", SMALL),
    ):
        pass
