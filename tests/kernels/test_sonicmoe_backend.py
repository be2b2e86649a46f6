"""The adapter to the SonicMoE package, with the package's functions written out in PyTorch.

What the real kernels compute is tested on a GPU with the other backends; here it is what the
adapter hands them: order, layout, and what it refuses.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from distmoe.bench.kernels.check import Expected, expect, faults
from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.shapes import Shape
from distmoe.bench.kernels.subjects import ContractSubject, Workspace
from distmoe.kernels.moe_mlp import MoeMlp, PairIndex, Runs
from distmoe.kernels.testing import assert_as_good_as

ADAPTER = "distmoe.kernels.moe_mlp.sonicmoe_backend"
SHAPE = Shape("small", T=24, H=16, I=8, E=4, K=2, tile=8)


def interleaved(w: Tensor) -> Tensor:
    """Halves of the columns, one of each in turn."""
    return torch.stack(w.chunk(2, dim=-1), dim=-1).flatten(-2)


def bounds(offsets: Tensor) -> list[tuple[int, int, int]]:
    ends = offsets.tolist()
    return [(i, begin, end) for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False))]


def gemm(A: Tensor, B: Tensor, *, out: Tensor, tuned: bool, **options: Any) -> None:
    # The sums are in fp32, whatever a CPU does with products of bf16.
    A, B = A.float(), B.float()
    concat = options.get("concat_layout")
    if "cu_seqlens_m" in options:
        if concat == ("B",):
            # The package interleaves along the dimension of B that is not contiguous.
            B = interleaved(B) if B.stride(-1) != 1 else interleaved(B.mT).mT
        rows = A if "A_idx" not in options else A[options["A_idx"].long()]
        for i, begin, end in bounds(options["cu_seqlens_m"]):
            out[begin:end] = rows[begin:end] @ B[i]
        return
    columns = A[:, options["A_idx"].long()]
    for i, begin, end in bounds(options["cu_seqlens_k"]):
        product = columns[:, begin:end] @ B[begin:end]
        if concat == ("out",):
            assert out.stride(-1) != 1
            product = torch.cat([product[:, ::2], product[:, 1::2]], dim=1)
        out[i] = product


def gemm_gated(
    A: Tensor,
    B: Tensor,
    *,
    activation: str,
    preact_out: Tensor,
    postact_out: Tensor,
    **options: Any,
) -> None:
    assert activation == "swiglu"
    gemm(A, B, out=preact_out, **options)
    gate, up = preact_out[:, ::2].float(), preact_out[:, 1::2].float()
    postact_out.copy_(torch.nn.functional.silu(gate) * up)


def gemm_dgated(
    A: Tensor, B: Tensor, *, PreAct: Tensor, activation: str, dx_out: Tensor, postact_out: Tensor,
    colvec_scale: Tensor, colvec_reduce: bool, dynamic_scheduler: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert colvec_reduce
    # Its epilogue has the product before it is rounded.
    da = torch.empty_like(postact_out, dtype=torch.float32)
    gemm(A, B, out=da, **options)
    gate, up = PreAct[:, ::2].float(), PreAct[:, 1::2].float()
    sigmoid = gate.sigmoid()
    a, scaled = gate * sigmoid * up, colvec_scale[:, None] * da
    slope = sigmoid + gate * sigmoid * (1 - sigmoid)
    dx_out.copy_(torch.stack([scaled * up * slope, scaled * gate * sigmoid], -1).flatten(-2))
    postact_out.copy_(colvec_scale[:, None] * a)
    return dx_out, postact_out, (a * da).sum(-1)


def gather_and_sum(
    x: Tensor, w: Tensor | None, out: Tensor, M_perm: Tensor, M_offset: Tensor,
    T: int, MAX_K: int, H: int, is_varlen_K: bool,
) -> None:  # fmt: skip
    assert is_varlen_K
    assert (T, H) == tuple(out.shape)
    for t, begin, end in bounds(M_offset):
        weight = 1.0 if w is None else w[begin:end, None]
        out[t] = (weight * x[M_perm[begin:end].long()].float()).sum(0)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, imported with a package of these functions."""
    package, functional, sums = (ModuleType(name) for name in ("sonicmoe", "functional", "sums"))
    vars(functional).update(gemm=gemm, gemm_gated=gemm_gated, gemm_dgated=gemm_dgated)
    vars(sums).update(token_gather_and_sum_varlen_K_triton=gather_and_sum)
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.functional", functional)
    monkeypatch.setitem(sys.modules, "sonicmoe.functional.reduction_over_k_gather", sums)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


@pytest.fixture(scope="module", params=["none", "nearest"])
def expected(request: pytest.FixtureRequest) -> Expected:
    return expect(SHAPE, request.param, torch.device("cpu"), torch.bfloat16)


def contract(backend: MoeMlp, problem: Problem) -> ContractSubject:
    return ContractSubject(backend, problem, Workspace.of(problem))


def test_pieces_are_right(adapter: ModuleType, expected: Expected) -> None:
    assert faults(contract(adapter.SonicMoeMlp("swiglu"), expected.problem), expected) == []


def test_row_sums_of_a_range_do_not_read_behind_the_last_pair(
    adapter: ModuleType, expected: Expected
) -> None:
    index, L = expected.problem.index, expected.problem.num_pairs
    garbage = torch.full((5,), 1 << 30, dtype=torch.int32)
    longer = PairIndex(
        row_L=torch.cat([index.row_L, garbage]),
        offsets_e1=index.offsets_e1,
        by_row_L=torch.cat([index.by_row_L, garbage]),
        row_offsets_R1=index.row_offsets_R1,
    )
    v_LH = torch.randn(L + 5, SHAPE.H)
    score_L = torch.rand(L + 5)
    out_RH = torch.full((SHAPE.T, SHAPE.H), 7.0)
    adapter.SonicMoeMlp("swiglu").row_sum(
        v_LH, index=longer, rows=slice(3, 9), score_L=score_L, out_RH=out_RH
    )
    weighted = score_L[:L, None] * v_LH[:L]
    whole = torch.zeros(SHAPE.T, SHAPE.H).index_add_(0, index.row_L.long(), weighted)
    assert_as_good_as(out_RH[3:9], whole[3:9], whole[3:9])
    assert bool((out_RH[:3] == 7).all() and (out_RH[9:] == 7).all())


def test_a_part_of_the_pairs_is_refused(adapter: ModuleType, expected: Expected) -> None:
    problem = expected.problem
    whole = Runs.of_all(problem.index)
    fewer = whole.bounds_2e.clone()
    fewer[1, -1] -= 1
    subject = contract(adapter.SonicMoeMlp("swiglu"), problem)
    parts = {ValueError: Runs(fewer, max_pairs=whole.max_pairs - 1)}
    parts[RuntimeError] = Runs(fewer, max_pairs=whole.max_pairs)
    for error, part in parts.items():
        subject.runs = part
        with pytest.raises(error, match="overlap with several steps is not supported"):
            subject.pieces()["forward"]()


def test_what_the_package_cannot_compute_is_refused(
    adapter: ModuleType, expected: Expected
) -> None:
    with pytest.raises(ValueError, match="activation 'geglu' is not supported .* it has swiglu"):
        adapter.SonicMoeMlp("geglu")
    subject = contract(adapter.SonicMoeMlp("swiglu"), expected.problem.to(torch.float32))
    with pytest.raises(ValueError, match="needs bf16 or fp16, not torch.float32"):
        subject.run("forward")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sonicmoe", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'distmoe\[sonicmoe\]'"):
        importlib.import_module(ADAPTER)
