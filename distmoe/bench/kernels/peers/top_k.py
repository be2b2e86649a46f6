"""Routing as peers want it that know a fixed number of experts a token."""

from __future__ import annotations

from torch import Tensor

from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import AutogradSubject, Layer


def chosen_experts(problem: Problem) -> Tensor:
    """[T, K] int32, ascending in a token; ValueError if not every token has K."""
    if not problem.fixed_top_k:
        raise ValueError("takes the same number of experts for every token only")
    by_row_L = problem.index.by_row_L.long()
    return problem.expert_L[by_row_L].view(problem.shape.T, problem.shape.K)


def top_k_subject(layer: Layer, problem: Problem) -> AutogradSubject:
    """Of a layer whose scores are [T, K] in the dtype of the rows."""
    return AutogradSubject(
        layer,
        problem,
        order=problem.index.by_row_L,
        score_shape=(problem.shape.T, problem.shape.K),
        score_dtype=problem.x_RH.dtype,
    )
