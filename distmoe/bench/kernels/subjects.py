"""Who is measured: an implementation bound to the tensors of one problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distmoe.bench.kernels.problem import Problem
from distmoe.kernels.moe_mlp import MoeMlp, Runs

MODES = ("forward", "backward", "both")
# What a mode computes.
RESULTS = {
    "forward": ("y",),
    "backward": ("dx", "dw_in", "dw_out", "dscore"),
    "both": ("y", "dx", "dw_in", "dw_out", "dscore"),
}


class Subject(Protocol):
    """One implementation with its inputs and outputs.

    ``checked``: it computes the problem, so that `results` must be right; False for a bound.
    ``pairs``: the (row, expert) pairs that it computes. ``score_dtype``: of the scores that it
    takes and the gradient that it gives.
    """

    checked: bool
    pairs: int
    score_dtype: torch.dtype

    def prepare(self, mode: str) -> None:
        """Untimed: what ``mode`` needs, and NaN in the outputs that it must write."""
        ...

    def run(self, mode: str) -> None:
        """Timed: a name in `MODES`."""
        ...

    def results(self, mode: str) -> dict[str, Tensor]:
        """What the last run of ``mode`` computed; dscore in the order of the problem's pairs."""
        ...

    def release(self) -> None:
        """Let go of what `run` left behind and the next `prepare` does not need."""
        ...


@dataclass(frozen=True)
class Workspace:
    """Buffers over pairs and rows, shared by all backends of the contract: they take turns."""

    z_LG: Tensor
    a_LI: Tensor
    y_LH: Tensor
    y_RH: Tensor
    dz_LG: Tensor
    dx_LH: Tensor
    dx_RH: Tensor
    dscore_L: Tensor

    @staticmethod
    def of(problem: Problem) -> Workspace:
        shape, L, new = problem.shape, problem.num_pairs, problem.x_RH.new_empty
        return Workspace(
            z_LG=new(L, 2 * shape.I),
            a_LI=new(L, shape.I),
            y_LH=new(L, shape.H),
            y_RH=new(shape.T, shape.H),
            dz_LG=new(L, 2 * shape.I),
            dx_LH=new(L, shape.H),
            dx_RH=new(shape.T, shape.H),
            dscore_L=problem.score_L.new_empty(L),
        )


class TwoPasses:
    """A subject made of a forward and a backward that can run alone."""

    def prepare(self, mode: str) -> None:
        self.release()
        if mode == "backward":
            self._forward()

    def run(self, mode: str) -> None:
        if mode != "backward":
            self._forward()
        if mode != "forward":
            self._backward()

    def release(self) -> None:
        raise NotImplementedError

    def _forward(self) -> None:
        raise NotImplementedError

    def _backward(self) -> None:
        raise NotImplementedError


class ContractSubject(TwoPasses):
    """A backend of `distmoe.kernels.moe_mlp`, called as the layer calls it on one rank."""

    checked = True
    score_dtype = torch.float32

    def __init__(self, backend: MoeMlp, problem: Problem, workspace: Workspace) -> None:
        self.backend, self.problem, self.space = backend, problem, workspace
        self.pairs = problem.num_pairs
        self.rows = slice(0, problem.shape.T)
        self.runs = Runs.of_all(problem.index)
        self.dw: tuple[Tensor, Tensor] | None = None

    def prepare(self, mode: str) -> None:
        space = self.space
        outputs = [space.dz_LG, space.dx_LH, space.dx_RH, space.dscore_L]
        if mode != "backward":
            outputs += [space.z_LG, space.y_LH, space.y_RH]
        for output in [space.a_LI, *outputs]:
            output.fill_(float("nan"))
        if mode == "backward":
            self._forward()

    def results(self, mode: str) -> dict[str, Tensor]:
        space = self.space
        found = {"y": space.y_RH, "dx": space.dx_RH, "dscore": space.dscore_L}
        if self.dw is not None:
            found["dw_in"], found["dw_out"] = self.dw
        return {name: found[name] for name in RESULTS[mode]}

    def release(self) -> None:
        self.dw = None

    def pieces(self) -> dict[str, Callable[[], object]]:
        """The calls of the contract one by one, in an order in which each finds its inputs; the
        halves of forward and dgrad too where the backend has them."""
        calls: dict[str, Callable[[], object]] = {
            "forward": self._experts,
            "sum_y": self._sum_y,
            "dgrad": self._dgrad,
            "sum_dx": self._sum_dx,
            "wgrad": self._wgrad,
        }
        if hasattr(self.backend, "up"):
            calls["up"] = self._up
        if hasattr(self.backend, "da"):
            calls["da"] = self._da
        return calls

    def _forward(self) -> None:
        # Made anew, as every step of training does, and shared with the backward.
        self.runs = Runs.of_all(self.problem.index)
        self._experts()
        self._sum_y()

    def _backward(self) -> None:
        self._dgrad()
        self._sum_dx()
        self._wgrad()

    def _experts(self) -> None:
        p, space = self.problem, self.space
        self.backend.forward(
            p.x_RH, p.w_in_eGH, p.w_out_eHI, index=p.index, runs=self.runs,
            z_LG=space.z_LG, a_LI=space.a_LI, y_LH=space.y_LH,
        )  # fmt: skip

    def _up(self) -> None:
        p, space = self.problem, self.space
        self.backend.up(  # type: ignore[attr-defined]
            p.x_RH, p.w_in_eGH, index=p.index, runs=self.runs, z_LG=space.z_LG, a_LI=space.a_LI
        )

    def _sum_y(self) -> None:
        self._row_sum(self.space.y_LH, self.problem.score_L, self.space.y_RH)

    def _sum_dx(self) -> None:
        self._row_sum(self.space.dx_LH, None, self.space.dx_RH)

    def _row_sum(self, v_LH: Tensor, score_L: Tensor | None, out_RH: Tensor) -> None:
        self.backend.row_sum(
            v_LH, index=self.problem.index, rows=self.rows, score_L=score_L, out_RH=out_RH
        )

    def _dgrad(self) -> None:
        p, space = self.problem, self.space
        self.backend.dgrad(
            p.dy_RH, p.score_L, space.z_LG, p.w_in_eGH, p.w_out_eHI,
            index=p.index, runs=self.runs, dz_LG=space.dz_LG, a_LI=space.a_LI,
            dx_LH=space.dx_LH, dscore_L=space.dscore_L,
        )  # fmt: skip

    def _da(self) -> None:
        p, space = self.problem, self.space
        self.backend.da(  # type: ignore[attr-defined]
            p.dy_RH, p.score_L, space.z_LG, p.w_out_eHI, index=p.index, runs=self.runs,
            dz_LG=space.dz_LG, a_LI=space.a_LI, dscore_L=space.dscore_L,
        )  # fmt: skip

    def _wgrad(self) -> None:
        p, space = self.problem, self.space
        self.dw = self.backend.wgrad(p.x_RH, p.dy_RH, space.dz_LG, space.a_LI, index=p.index)


# y_RH from x_RH, w_in_eGH, w_out_eHI and the scores in the order that the layer takes.
Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class AutogradSubject(TwoPasses):
    """A whole layer that is differentiated by autograd.

    ``order``: pair of every place of its scores (None: the problem's order). ``score_shape``: of
    the scores, as [T, K].
    """

    checked = True

    def __init__(
        self,
        layer: Layer,
        problem: Problem,
        *,
        order: Tensor | None = None,
        score_shape: tuple[int, ...] | None = None,
        score_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layer, self.problem, self.score_dtype = layer, problem, score_dtype
        self.pairs = problem.num_pairs
        self.order = None if order is None else order.long()
        score = problem.score_L if self.order is None else problem.score_L[self.order]
        score = score.to(score_dtype).view(score_shape or (-1,))
        inputs = (problem.x_RH, problem.w_in_eGH, problem.w_out_eHI, score)
        self.inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        self.y_RH: Tensor | None = None
        self.gradients: tuple[Tensor, ...] = ()

    def results(self, mode: str) -> dict[str, Tensor]:
        assert self.y_RH is not None
        found = {"y": self.y_RH.detach()}
        if self.gradients:
            dx, dw_in, dw_out, dscore = self.gradients
            dscore = dscore.flatten()
            if self.order is not None:
                dscore = torch.empty_like(dscore).index_copy_(0, self.order, dscore)
            found |= {"dx": dx, "dw_in": dw_in, "dw_out": dw_out, "dscore": dscore}
        return {name: found[name] for name in RESULTS[mode]}

    def release(self) -> None:
        self.y_RH, self.gradients = None, ()

    def _forward(self) -> None:
        with torch.enable_grad():
            self.y_RH = self.layer(*self.inputs)

    def _backward(self) -> None:
        assert self.y_RH is not None
        self.gradients = torch.autograd.grad(self.y_RH, self.inputs, self.problem.dy_RH)
