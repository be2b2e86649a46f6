"""What dense products of the same size cost: a bound for layers that gather, and no layer.

Batched products over experts with equal numbers of rows that lie in order already, the activation
and its derivative as one elementwise kernel each, and the two sums over a row's pairs. SonicMoE
(arXiv 2512.14080, figure 1) compares with the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import Subject, TwoPasses


def subject(problem: Problem) -> Subject:
    """Pairs are rounded down to a whole number of rows for every expert."""
    return Bound(problem)


class Bound(TwoPasses):
    """Computes numbers of its own: nothing to check, and its own number of pairs."""

    checked = False
    score_dtype = torch.float32

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        rows = problem.num_pairs // shape.E
        if not rows:
            raise ValueError("has less than one pair an expert")
        self.problem, self.pairs = problem, rows * shape.E
        new = problem.x_RH.new_empty
        self.x, self.dy = (new(shape.E, rows, shape.H).normal_() for _ in range(2))
        self.z, self.dz = (new(shape.E, rows, 2 * shape.I) for _ in range(2))
        self.a, self.da = (new(shape.E, rows, shape.I) for _ in range(2))
        self.y, self.dx = (new(shape.E, rows, shape.H) for _ in range(2))
        self.dw_in, self.dw_out = (
            torch.empty_like(w) for w in (problem.w_in_eGH, problem.w_out_eHI)
        )
        self.score = problem.score_L[: self.pairs].view(shape.E, rows, 1).clone()
        num_tokens = self.pairs // shape.K
        places = torch.randperm(self.pairs, device=problem.device)[: num_tokens * shape.K]
        self.pair_TK = places.view(num_tokens, shape.K)
        self.score_TK = self.score.flatten()[self.pair_TK]
        self.ones_TK = torch.ones_like(self.score_TK)
        self.results_now: dict[str, Tensor] = {}
        self.activate, self.activate_backward, self.weighted_sum = _fused(
            problem.device, _activate, _activate_backward, _weighted_sum
        )

    def results(self, mode: str) -> dict[str, Tensor]:
        return dict(self.results_now)

    def release(self) -> None:
        self.results_now = {}

    def _forward(self) -> None:
        torch.bmm(self.x, self.problem.w_in_eGH.mT, out=self.z)
        self.a = self.activate(self.z)
        torch.bmm(self.a, self.problem.w_out_eHI.mT, out=self.y)
        self.results_now["y"] = self._sum(self.y, self.score_TK)

    def _backward(self) -> None:
        torch.bmm(self.dy, self.problem.w_out_eHI, out=self.da)
        self.dz, a_scaled, dscore = self.activate_backward(self.da, self.z, self.score)
        torch.bmm(self.dz, self.problem.w_in_eGH, out=self.dx)
        dx = self._sum(self.dx, self.ones_TK)
        torch.bmm(self.dy.mT, a_scaled, out=self.dw_out)
        torch.bmm(self.dz.mT, self.x, out=self.dw_in)
        found = {"dx": dx, "dw_in": self.dw_in, "dw_out": self.dw_out, "dscore": dscore}
        self.results_now |= found

    def _sum(self, v: Tensor, score_TK: Tensor) -> Tensor:
        summed: Tensor = self.weighted_sum(v.flatten(0, 1), self.pair_TK, score_TK)
        return summed


def _activate(z: Tensor) -> Tensor:
    gate, up = z.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(z.dtype)


def _activate_backward(da: Tensor, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz, score * a, and dscore."""
    gate, up = z.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    a, da = silu * up, da.float()
    scaled = da * score
    dz = torch.cat([scaled * up * (sigmoid + silu * (1 - sigmoid)), scaled * silu], dim=-1)
    return dz.to(z.dtype), (score * a).to(z.dtype), (da * a).sum(-1)


def _weighted_sum(v_LH: Tensor, pair_TK: Tensor, score_TK: Tensor) -> Tensor:
    return (v_LH[pair_TK].float() * score_TK[..., None]).sum(1).to(v_LH.dtype)


def _fused(device: torch.device, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """One kernel of each function on a GPU; the functions themselves on a CPU, where compiling
    takes longer than it saves."""
    if device.type == "cpu":
        return list(functions)
    # Sizes are constants to the compiler, which gives up on a function after a few sizes.
    torch.compiler.reset()
    return [torch.compile(function, dynamic=False) for function in functions]
