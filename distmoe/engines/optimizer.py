"""What turns gradients into new weights: `optim.name` picks a row of `registry.OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from distmoe.config import Config, OptimConfig
from distmoe.model.matrices import matrix_rows
from distmoe.model.transformer import Transformer
from distmoe.registry import OPTIMIZERS


class OptimizerBuilder(Protocol):
    """What a row of the table is.

    Gradients are there, reduced and clipped, before a step. Every rank has the same parameters in
    the same order, of which it may hold shards (DTensors), so a step may communicate.
    """

    def __call__(
        self,
        named: Iterable[tuple[str, Tensor]],
        optim: OptimConfig,
        matrix_rows: Mapping[str, tuple[int, ...]],
    ) -> torch.optim.Optimizer:
        """An optimizer of the fp32 parameters ``named``. Its groups have ``states``, the names of
        what is kept for each of their parameters: tensors as the parameter, sharded as it is, and
        the number ``step``. ``matrix_rows``: what `distmoe.model.matrices` says of the model."""
        ...


def make_optimizer(
    config: Config, model: Transformer, named: Iterable[tuple[str, Tensor]]
) -> torch.optim.Optimizer:
    """For ``named``, the fp32 parameters of ``model``."""
    build: OptimizerBuilder = OPTIMIZERS.load(config.optim.name)
    return build(named, config.optim, matrix_rows(model))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
