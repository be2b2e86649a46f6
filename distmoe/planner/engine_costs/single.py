"""`SingleEngine`: a model in the compute dtype, fp32 master weights and gradients, moments."""

from __future__ import annotations

from math import prod

from distmoe.config import Config
from distmoe.planner.engine_costs import FP32, EngineTraffic, Held, Job
from distmoe.planner.optimizer_costs import muon_buffers, muon_units
from distmoe.planner.parameter_shapes import elements
from distmoe.planner.step_moments import Moment, Stage


class SingleCosts:
    """Nothing is sharded. A weight's gradient is added to the master's as soon as it is there."""

    def __init__(self, job: Job) -> None:
        self.job = job
        units = job.units
        self.whole = units.dense_elements + units.expert_elements
        self.parameters = (FP32 + job.itemsize) * self.whole
        self.muon = muon_units(job.config, units)
        self.optimizer = FP32 * (2 * self.whole - self.muon.elements)

    @staticmethod
    def traffic(config: Config) -> EngineTraffic:
        return EngineTraffic()

    def held(self, moment: Moment) -> Held:
        done = self.whole if self.job.accumulates else self.job.finished(moment)
        return Held(FP32 * done, self._buffers(moment))

    def _buffers(self, moment: Moment) -> int:
        units, b, stage = self.job.units, self.job.itemsize, moment.stage
        if stage is Stage.EXPERT_WEIGHTS:
            return b * elements(units.experts)
        if stage is Stage.REDUCE_EXPERTS:
            first, second = map(prod, units.experts)
            fresh = 0 if self.job.accumulates else FP32
            return max(b * (first + second) + fresh * first, b * second + fresh * (first + second))
        if stage is Stage.REDUCE_ROOT:
            return b * elements(units.root[:1])
        if stage is Stage.REDUCE_HEAD:
            fresh = 0 if self.job.accumulates else FP32
            return (b + fresh) * elements(units.root[:1])
        if stage is Stage.STEP:
            return self._optimizer_step()
        if stage is Stage.LOSS:
            return 0
        block = units.moe_block if self.job.has_experts(moment.block) else units.dense_block
        return (b + FP32) * max(map(prod, block))

    def _optimizer_step(self) -> int:
        """Of AdamW on a CPU the root of the second moment, and that divided by its correction,
        weight by weight; a GPU's fused update takes nothing."""
        units, muon, roots = self.job.units, self.muon, 0
        if not self.job.on_gpu:
            blocks = (*units.dense_block, *units.moe_block, *units.experts)
            roots = 2 * max(map(prod, (*units.root, *(() if muon.elements else blocks))))
        weights = (*muon.units.dense_block, *muon.units.moe_block, *muon.units.experts)
        matrices = (*muon.dense, *muon.routed, *muon.experts)
        return max(
            FP32 * roots,
            muon_buffers(
                whole=max(map(prod, weights), default=0),
                batch=max(map(prod, matrices), default=0),
                cut=0,
                largest_cut=0,
                on_gpu=self.job.on_gpu,
            ),
        )
