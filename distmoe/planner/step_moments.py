"""The moments of an optimizer step at one of which memory is at its peak."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Moments of a step; those between the loss and the root are of one block's backward."""

    LOSS = "loss"
    EXPERTS = "experts"
    EXPERT_WEIGHTS = "gradients of expert weights"
    REDUCE_EXPERTS = "reduction of expert gradients"
    MLP = "dense MLP"
    ATTENTION = "attention"
    REDUCE_BLOCK = "reduction of a block's gradients"
    REDUCE_ROOT = "reduction of embedding and head"
    STEP = "optimizer"


@dataclass(frozen=True)
class Moment:
    """``block``: whose backward it is, from 0. The loss has the number of blocks, root and
    optimizer have -1: in every case the blocks with a higher number have their gradients."""

    stage: Stage
    block: int
