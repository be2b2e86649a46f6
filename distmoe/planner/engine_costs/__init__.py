"""What an engine costs a rank: memory beside activations, and what it sends between ranks.

A step has a few moments at one of which memory is at its peak; an engine tells for each what it
holds then, and when it gathers parameters and reduces gradients. Every engine of `registry.ENGINES`
has one file here and a line in `ENGINE_COSTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distmoe.config import Config
from distmoe.config.batch import micro_batches
from distmoe.planner.parameter_shapes import ModelUnits, elements
from distmoe.planner.step_moments import Moment, Stage

FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes on a rank at one moment. ``gradients``: those that wait for the optimizer. ``buffers``:
    gathered parameters, gradients on their way, and what the optimizer makes in between."""

    gradients: int
    buffers: int


@dataclass(frozen=True)
class Job:
    """A resolved ``config`` on ``world`` ranks. ``itemsize``: bytes of the compute dtype.
    ``on_gpu``: else a CPU, whose optimizer goes parameter by parameter and whose gloo copies."""

    config: Config
    world: int
    units: ModelUnits
    itemsize: int
    on_gpu: bool

    @property
    def accumulates(self) -> bool:
        """Whether an optimizer step has several micro-batches: gradients are there already."""
        return micro_batches(self.config, self.world) > 1

    @property
    def num_blocks(self) -> int:
        return self.units.num_dense + self.units.num_moe

    def finished(self, moment: Moment) -> int:
        """Elements of one rank's weights that have their gradients in the first micro-batch: those
        of the blocks after this one, of its experts after their turn, and the head's."""
        units = self.units
        if moment.stage in (Stage.LOSS, Stage.REDUCE_HEAD):
            return 0
        if moment.block < 0:
            return units.dense_elements + units.expert_elements
        dense = max(units.num_dense - moment.block - 1, 0)
        moe = self.num_blocks - max(moment.block + 1, units.num_dense)
        done = elements(units.root[:1]) + dense * elements(units.dense_block)
        done += moe * elements((*units.moe_block, *units.experts))
        after_experts = moment.stage in (Stage.ATTENTION, Stage.REDUCE_BLOCK)
        if after_experts and self.has_experts(moment.block):
            done += elements(units.experts)
        return done

    def has_experts(self, block: int) -> bool:
        """Whether the second half of the block is experts."""
        return block >= self.units.num_dense


@dataclass(frozen=True)
class EngineTraffic:
    """``gathers_forward``, ``gathers_backward``: a block's parameters, in the compute dtype, for
    every pass; with ``gathers_once``, for that of a step's first micro-batch.
    ``reduces_every_backward``: gradients, in fp32; else once a step, with ``reduces_in_last`` in
    the backward of its last micro-batch. Replicas meet in that one only. ``hidden``: reductions go
    on beside the backward; gathers of sharded parameters always do. ``gathers_update``: the new
    parameters, after the optimizer."""

    gathers_forward: bool = False
    gathers_backward: bool = False
    gathers_once: bool = False
    reduces_every_backward: bool = True
    reduces_in_last: bool = False
    hidden: bool = True
    gathers_update: bool = False


class EngineCosts(Protocol):
    """One engine on one job. ``parameters`` and ``optimizer``: bytes that are there all the time,
    every copy of the weights among the parameters."""

    parameters: int
    optimizer: int

    def __init__(self, job: Job) -> None: ...

    def held(self, moment: Moment) -> Held:
        """The rest of the memory."""
        ...

    @staticmethod
    def traffic(config: Config) -> EngineTraffic:
        """Of a resolved ``config``; groups of one rank have nothing to send."""
        ...
