"""The moments of an optimizer step at one of which memory is at its peak."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Moments of a step; those between the loss and the root are of one block's backward."""

    LOSS = "loss"
    REDUCE_HEAD = "reduction of the head's gradient"
    EXPERTS = "experts"
    EXPERT_WEIGHTS = "gradients of expert weights"
    REDUCE_EXPERTS = "reduction of expert gradients"
    MLP = "dense MLP"
    ATTENTION = "attention"
    REDUCE_BLOCK = "reduction of a block's gradients"
    REDUCE_ROOT = "reduction of the embedding's gradient"
    STEP = "optimizer"


@dataclass(frozen=True)
class Moment:
    """``block``: whose backward it is, from 0. Loss and head have the number of blocks, root and
    optimizer have -1: in every case the blocks with a higher number have their gradients."""

    stage: Stage
    block: int
