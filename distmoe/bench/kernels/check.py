"""Is it right? Results against the fp32 reference, judged by the project's tolerance rule."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.bench.kernels.problem import Problem, make_problem
from distmoe.bench.kernels.shapes import Shape
from distmoe.bench.kernels.subjects import ContractSubject, Subject
from distmoe.kernels.moe_mlp.reference import moe_mlp
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty


@dataclass(frozen=True)
class Expected:
    """Results of the reference in fp32, and in the dtype of the problem, by name."""

    problem: Problem
    exact: dict[str, Tensor]
    same_dtype: dict[str, Tensor]


def expect(shape: Shape, rule: str, device: torch.device, dtype: torch.dtype) -> Expected:
    """References for ``shape``, with half of its tokens, and half again, while memory is short."""
    while True:
        try:
            return _expect_all(make_problem(shape, rule, device, dtype))
        except torch.OutOfMemoryError:
            if shape.T < 2 * shape.tile:
                raise
        torch.cuda.empty_cache()
        shape = replace(shape, T=shape.T // 2)


def _expect_all(problem: Problem) -> Expected:
    exact = _reference(problem.to(torch.float32))
    return Expected(problem, exact, _reference(problem))


def faults(subject: Subject, expected: Expected) -> list[str]:
    """One line for each result that is wrong; runs the subject once, for ``expected.problem``."""
    if not subject.checked:
        return []
    # Only our own code is run with poisoned memory: peers may rely on what they allocate.
    poison = isinstance(subject, ContractSubject)
    with poisoned_empty() if poison else contextlib.nullcontext():
        subject.prepare("both")
        subject.run("both")
    results = subject.results("both")
    found = []
    for name, exact in expected.exact.items():
        same_dtype = expected.same_dtype[name]
        if name == "dscore":
            same_dtype = same_dtype.to(subject.score_dtype)
        try:
            assert_as_good_as(results[name], same_dtype, exact, name)
        except AssertionError as error:
            found.append(str(error))
    subject.release()
    return found


def not_finite(subject: Subject, mode: str) -> list[str]:
    """Names of the results of the last run that hold a NaN or an infinity."""
    results = subject.results(mode).items()
    return [name for name, tensor in results if not bool(tensor.isfinite().all())]


def _reference(problem: Problem) -> dict[str, Tensor]:
    tensors = (problem.x_RH, problem.w_in_eGH, problem.w_out_eHI, problem.score_L)
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        y_RH = moe_mlp(
            *inputs[:3],
            row_L=problem.index.row_L,
            expert_L=problem.expert_L,
            score_L=inputs[3],
        )
    dx, dw_in, dw_out, dscore = torch.autograd.grad(y_RH, inputs, problem.dy_RH)
    return {"y": y_RH.detach(), "dx": dx, "dw_in": dw_in, "dw_out": dw_out, "dscore": dscore}
