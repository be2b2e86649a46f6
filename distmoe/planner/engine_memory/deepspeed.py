"""`DeepSpeedZeroEngine`: flat partitions of parameter groups by ZeRO 1, 2 or 3 (DeepSpeed 0.19.8).

Groups are dense weights that decay, those that do not, and experts. Each is one flat tensor, padded
to a multiple of twice its ranks: all of them for dense weights, those with the same experts for
experts.
"""

from __future__ import annotations

from math import prod

from distmoe.planner.engine_memory import FP32, Held, Job
from distmoe.planner.parameter_shapes import elements
from distmoe.planner.step_moments import Moment, Stage


class DeepSpeedMemory:
    """Offloaded state counts on a CPU only, whose memory it is."""

    def __init__(self, job: Job) -> None:
        self.job, self.b = job, job.itemsize
        self.stage = job.config.deepspeed.zero_stage
        self.offloads = job.on_gpu and job.config.deepspeed.offload_optimizer == "cpu"
        units, ep = job.units, job.config.parallel.ep
        decayed = units.dense_elements - units.plain
        self.flat = [
            _padded(decayed, job.world),
            _padded(units.plain, job.world),
            _padded(units.expert_elements, job.world // ep),
        ]
        ranks = (job.world, job.world, job.world // ep)
        self.partition = [flat // n for flat, n in zip(self.flat, ranks, strict=True)]
        whole = sum(self.partition) if self.stage == 3 else sum(self.flat)
        if job.on_gpu and job.config.deepspeed.offload_parameters == "cpu":
            whole = 0
        master = 0 if self.offloads else FP32 * sum(self.partition)
        self.parameters = self.b * whole + master
        self.optimizer = 2 * master

    def held(self, moment: Moment) -> Held:
        buffers = self._gathered(moment)
        if moment.stage is Stage.STEP:
            # The gradients of a group in one piece, and the root of the second moment.
            buffers += 0 if self.offloads else 2 * FP32 * max(self.partition)
        else:
            overlap = 2 if self.job.config.deepspeed.overlap_comm else 1
            buffers += FP32 * self.job.config.deepspeed.bucket_elements * overlap
        return Held(self._gradients(), buffers)

    def _gradients(self) -> int:
        if self.stage == 1:
            return FP32 * sum(self.flat)
        return 0 if self.offloads else FP32 * sum(self.partition)

    def _gathered(self, moment: Moment) -> int:
        """Whole gradients of the block, and with stage 3 its parameters and what is fetched
        ahead."""
        units = self.job.units
        if moment.stage is Stage.STEP:
            return 0
        if moment.block < 0 or moment.stage is Stage.LOSS:
            block = elements(units.root[:1])
        elif self.job.has_experts(moment.block):
            block = elements(units.moe_block) + elements(units.experts)
        else:
            block = elements(units.dense_block)
        whole = self.b * block
        if moment.stage is Stage.EXPERT_WEIGHTS:
            whole = self.b * max(map(prod, units.experts))
        if self.stage == 3:
            whole += self.b * (block + self.job.config.deepspeed.bucket_elements)
        return whole


def _padded(size: int, ranks: int) -> int:
    """To a multiple of twice the ranks."""
    return -(-size // (2 * ranks)) * 2 * ranks
