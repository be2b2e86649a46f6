"""`DeepSpeedZeroEngine`: partitions of parameter groups by ZeRO 1, 2 or 3 of DeepSpeed 0.19.8.

Groups are dense weights that decay, those that do not, and experts. With stages 1 and 2 each is one
flat tensor, padded to a multiple of twice its ranks: all of them for dense weights, those with the
same experts for experts. Stage 3 cuts every parameter by itself, and frees a gathered one only when
it is not due again among the next max_live elements; what runs is gathered, however large it is.
"""

from __future__ import annotations

from math import prod

from distmoe.config import Config
from distmoe.planner.engine_costs import FP32, EngineTraffic, Held, Job
from distmoe.planner.parameter_shapes import Shape, elements
from distmoe.planner.step_moments import Moment, Stage

# DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance, which are not set.
MAX_LIVE = 1_000_000_000


class DeepSpeedCosts:
    """Offloaded state counts on a CPU only, whose memory it is."""

    def __init__(self, job: Job) -> None:
        self.job, self.b = job, job.itemsize
        self.options = job.config.deepspeed
        self.stage = self.options.zero_stage
        self.whole = job.units.dense_elements + job.units.expert_elements
        self.flat, self.partition = self._partitions()
        self._offloads = job.on_gpu and self.options.offload_optimizer == "cpu"
        masters = 0 if self._offloads else sum(self.partition)
        self.parameters = self._resident_parameters() + FP32 * masters
        self.optimizer = 0 if self._offloads else 2 * FP32 * sum(self.partition)

    def _partitions(self) -> tuple[list[int], list[int]]:
        """Elements of every group, and of a rank's part of it, padding included, in the order in
        which they are updated."""
        units, world = self.job.units, self.job.world
        same_experts = world // self.job.config.parallel.ep
        if self.stage == 3:
            dense = _cut(units.root, world)
            dense += units.num_dense * _cut(units.dense_block, world)
            dense += units.num_moe * _cut(units.moe_block, world)
            # The group that does not decay is small, and counted with the other one.
            partition = [0, dense, units.num_moe * _cut(units.experts, same_experts)]
            return [0, world * dense, same_experts * partition[2]], partition
        ranks = (world, world, same_experts)
        sizes = (units.plain, units.dense_elements - units.plain, units.expert_elements)
        flat = [_padded(size, n) for size, n in zip(sizes, ranks, strict=True)]
        return flat, [size // n for size, n in zip(flat, ranks, strict=True)]

    def _resident_parameters(self) -> int:
        """In the compute dtype, between their uses."""
        if self.stage < 3:
            return self.b * sum(self.flat)
        if self.job.on_gpu and self.options.offload_parameters == "cpu":
            return 0
        return self.b * sum(self.partition)

    @property
    def zero3_host_bytes(self) -> int:
        """What stage 3 keeps in host memory: fp32 weights, two moments, and the gradients of all
        micro-batches and those for the optimizer; parameters in the compute dtype."""
        state = 5 * FP32 if self._offloads else 0
        offloads_parameters = self.job.on_gpu and self.options.offload_parameters == "cpu"
        return (state + (self.b if offloads_parameters else 0)) * sum(self.partition)

    @staticmethod
    def traffic(config: Config) -> EngineTraffic:
        stage = config.deepspeed.zero_stage
        return EngineTraffic(
            gathers_forward=stage == 3,
            gathers_backward=stage == 3,
            reduces_every_backward=stage > 1,
            hidden=config.deepspeed.overlap_comm,
            gathers_update=stage < 3,
        )

    def held(self, moment: Moment) -> Held:
        gradients = self._gradients(moment)
        if moment.stage is Stage.STEP:
            return Held(gradients, self._optimizer_step())
        return Held(gradients, self._gathered() + self._reduction() + self._whole(moment))

    def _gradients(self, moment: Moment) -> int:
        if self.stage == 3:
            # One buffer from beginning to end.
            return 0 if self._offloads else FP32 * sum(self.partition)
        done = self.whole if self.job.accumulates else self.job.finished(moment)
        if self.stage == 1 and moment.stage is not Stage.STEP:
            return FP32 * done
        # The partition's buffer is made when the first bucket is full.
        begun = done > self.options.bucket_elements or moment.block < 0
        return FP32 * sum(self.partition) if begun and not self._offloads else 0

    def _gathered(self) -> int:
        """Whole parameters of stage 3: those kept or gathered ahead, or the experts that run."""
        if self.stage < 3:
            return 0
        return self.b * max(min(self.whole, MAX_LIVE), elements(self.job.units.experts))

    def _reduction(self) -> int:
        """The bucket, and a copy of what is in it that is summed in fp32."""
        bucket = self.options.bucket_elements
        filled = min(bucket, self.whole)
        itemsize = self.b if self.stage == 2 else FP32
        copied = FP32 * filled if self.stage == 3 or itemsize != FP32 else 0
        return itemsize * bucket * (2 if self.options.overlap_comm else 1) + copied

    def _whole(self, moment: Moment) -> int:
        """Gradients that autograd has just made."""
        units = self.job.units
        if moment.stage is Stage.EXPERT_WEIGHTS:
            return self.b * elements(units.experts)
        if moment.stage is Stage.LOSS:
            return 0
        if moment.stage is Stage.REDUCE_HEAD or moment.block < 0:
            return self.b * prod(units.root[0])
        kind = units.moe_block if self.job.has_experts(moment.block) else units.dense_block
        return self.b * max(map(prod, kind))

    def _optimizer_step(self) -> int:
        """A group's gradients in one piece, in place of them with stages 1 and 2; then on a
        CPU the root of its second moment and what that is divided into; a fused update takes
        neither. Groups that are updated have no gradients any more. Offloaded, nothing of it is on
        the GPU."""
        if self._offloads:
            return 0
        fused = self.job.on_gpu or self.options.offload_optimizer != "none"
        roots = 0 if fused else 2
        if self.stage == 3:
            return FP32 * (1 + roots) * max(self.partition)
        updated, most = 0, 0
        for size in self.partition:
            most = max(most, max(1, roots) * size - updated)
            updated += size
        return FP32 * most


def _padded(size: int, ranks: int) -> int:
    """To a multiple of twice the ranks."""
    return -(-size // (2 * ranks)) * 2 * ranks


def _cut(shapes: tuple[Shape, ...], ranks: int) -> int:
    """A rank's part of tensors that are cut one by one."""
    return sum(-(-prod(shape) // ranks) for shape in shapes)
