"""Muon for the matrices of the blocks, AdamW for all other parameters.

    M <- mu M + G
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) NS(G + mu M)        W, G, M [m, n]

with NS of `newton_schulz`. NS(...) has singular values around 1, so the factor gives every matrix
an update of root mean square about 0.2, which is what AdamW's usually have: learning rate and decay
carry over (Moonlight, arXiv 2502.16982, section 2.2; Nesterov as in their code). Which weights are
matrices, and how many are in one: `distmoe.model.matrices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distmoe.config import OptimConfig
from distmoe.engines.adamw import build_adamw
from distmoe.engines.matrix_exchange import MatrixExchange, Stack
from distmoe.engines.newton_schulz import orthogonalize_

RMS = 0.2
MOMENTUM = "momentum"


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter [..., sum of ``rows``, columns], of whose rows this rank may hold a part."""

    parameter: Tensor
    rows: tuple[int, ...]

    @property
    def row_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the rows; None where every matrix is whole."""
        if not isinstance(self.parameter, DTensor):
            return None
        mesh, row_dim = self.parameter.device_mesh, self.parameter.ndim - 2
        for axis, placement in enumerate(self.parameter.placements):
            dim = getattr(placement, "dim", None)
            if dim == row_dim and mesh.size(axis) > 1:
                return mesh.get_group(axis)
            if dim == row_dim + 1:
                raise AssertionError("matrices are cut by columns")
        return None

    @property
    def stack(self) -> Stack:
        batch = _as_batch(self.parameter).shape[0]
        return Stack(batch, self.rows, int(self.parameter.shape[-1]))


class Muon(torch.optim.Optimizer):
    """Momentum of every weight of ``weights``, in fp32, as sharded as the weight itself. Newton-
    Schulz runs in bf16 on a GPU and in fp32 on a CPU. ``others`` updates the other parameters; its
    groups and states are also this optimizer's."""

    def __init__(
        self, weights: Sequence[Weight], others: torch.optim.Optimizer, optim: OptimConfig
    ) -> None:
        self.others, self.momentum = others, optim.momentum
        own = {"weight_decay": optim.weight_decay, "states": (MOMENTUM,)}
        parameters = [weight.parameter for weight in weights]
        super().__init__([{"params": parameters, **own}], {"lr": optim.lr})
        self._group = self.param_groups[0]
        self.param_groups += others.param_groups
        self.state = others.state
        self._whole = [weight for weight in weights if weight.row_group is None]
        self._exchanges = _exchanges(weights)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update everything; collective over the ranks that share a model's weights."""
        for weight in self._whole:
            update = self._momentum_update(weight)
            for part in torch.split(update, list(weight.rows), dim=-2):
                _direction_(part)
            self._apply(weight, update)
        for exchange, weights in self._exchanges:
            updates = [self._momentum_update(weight) for weight in weights]
            exchange.apply_(updates, _direction_)
            for weight, update in zip(weights, updates, strict=True):
                self._apply(weight, update)
        self.others.step()

    def _momentum_update(self, weight: Weight) -> Tensor:
        """This rank's part [batch, rows, columns] of G + mu M, with the new M."""
        parameter = weight.parameter
        if parameter.grad is None:
            raise AssertionError("a matrix has no gradient")
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter)
        gradient, momentum = _as_batch(parameter.grad), _as_batch(state[MOMENTUM])
        momentum.mul_(self.momentum).add_(gradient)
        update = gradient.add(momentum, alpha=self.momentum)
        return update.to(torch.bfloat16) if update.is_cuda else update

    def _apply(self, weight: Weight, direction: Tensor) -> None:
        lr, decay = self._group["lr"], self._group["weight_decay"]
        _as_batch(weight.parameter).mul_(1 - lr * decay).add_(direction, alpha=-lr)


def build_muon(
    named: Iterable[tuple[str, Tensor]],
    optim: OptimConfig,
    matrix_rows: Mapping[str, tuple[int, ...]],
) -> Muon:
    """Muon for the weights of ``matrix_rows``, AdamW's groups for the rest."""
    weights, rest = [], []
    for name, parameter in named:
        if name in matrix_rows:
            weights.append(Weight(parameter, matrix_rows[name]))
        else:
            rest.append((name, parameter))
    if len(weights) != len(matrix_rows):
        raise AssertionError("matrices of the model are not among the parameters")
    return Muon(weights, build_adamw(rest, optim, matrix_rows), optim)


def _direction_(x_BMN: Tensor) -> Tensor:
    """Orthogonal matrices with entries of root mean square RMS, in place."""
    return orthogonalize_(x_BMN).mul_(RMS * sqrt(max(x_BMN.shape[-2:])))


def _as_batch(tensor: Tensor) -> Tensor:
    """This rank's part as [batch, rows, columns], a view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return local if local.ndim == 3 else local[None]


def _exchanges(weights: Sequence[Weight]) -> list[tuple[MatrixExchange, list[Weight]]]:
    """One for every group that shares rows, in the order of the parameters, on all ranks alike."""
    groups: dict[str, tuple[dist.ProcessGroup, list[Weight]]] = {}
    for weight in weights:
        if (group := weight.row_group) is not None:
            groups.setdefault(group.group_name, (group, []))[1].append(weight)
    return [
        (MatrixExchange([weight.stack for weight in members], group), members)
        for group, members in groups.values()
    ]
